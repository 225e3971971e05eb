"""An adapter and its base as one model."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_accel.commands import merge, parsers
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models.lora import scaled_adapter
from rlhf_accel.models.probes import export_is_memory
from rlhf_accel.runs.exports import ExportError
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer


@pytest.fixture
def trained(tiny, tmp_path: Path) -> Path:
    """The folder of a run with a trained adapter."""
    lora = {"r": 4, "target_modules": ["c_attn", "c_fc"]}
    PPOTrainer(tiny(lora=lora, model={"critic": "adapter"}, optim={"lr": 0.05}, run={"eval_samples": 0})).fit()
    return tmp_path / "run"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[40, 41, 42, 43]])).logits


def test_the_merged_model_is_the_base_with_the_adapter(
    trained: Path, gpt2_folder: Path, tmp_path: Path, capsys
) -> None:
    merge.main(parsers.merge([str(trained), str(tmp_path / "merged")]))
    assert f"merged into {tmp_path / 'merged'}" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    adapted = AutoPeftModelForCausalLM.from_pretrained(trained / "final")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-5)
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(gpt2_folder))).abs().max() > 0.01
    modes = {path.stat().st_mode for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    assert len(modes) == 1, "safetensors' own files are for nobody else"
    text = "A dull, tired"
    ids = [AutoTokenizer.from_pretrained(place)(text).input_ids for place in (tmp_path / "merged", gpt2_folder)]
    assert ids[0] == ids[1]


def test_a_scale_interpolates_the_weights(trained: Path, gpt2_folder: Path, tmp_path: Path) -> None:
    """With a quarter of the adapter, the weights are a quarter of the way from the base."""
    for scale in (1.0, 0.25):
        merge.main(parsers.merge([str(trained), str(tmp_path / f"{scale}"), "--scale", str(scale)]))
    base, whole, part = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (gpt2_folder, tmp_path / "1.0", tmp_path / "0.25")
    )
    assert any((whole[name] - base[name]).abs().max() > 0.01 for name in base)
    for name in base:
        torch.testing.assert_close(part[name], torch.lerp(base[name], whole[name], 0.25), atol=1e-6, rtol=1e-5)


def test_the_critic_is_copied(trained: Path, tmp_path: Path) -> None:
    merge.merge(trained / "final", tmp_path / "merged", dtype="bf16")
    for name in ("value_head.safetensors", "critic/adapter_model.safetensors"):
        one, other = load_file(trained / "final" / name), load_file(tmp_path / "merged" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, 0.5),
        ({"target_modules": ["q_proj", "lm_head"]}, 1.0),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 1.0),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_dora": True}, 1.0),
        ({"target_modules": ["q_proj"], "use_rslora": True}, 0.5),
    ],
    ids=["embedding", "head", "whole embedding", "whole head and DoRA", "neither"],
)
def test_tied_embeddings_are_untied_if_one_is_trained(
    tiny, llama_folder: Path, tmp_path: Path, lora: dict, scale: float
) -> None:
    trainer = PPOTrainer(tiny(model={"name_or_path": str(llama_folder)}, lora={"r": 4, **lora}))
    torch.manual_seed(0)
    for parameter in trainer.runtime.plain_module.policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    trainer.run.recorder.export("final", {}, trainer.setup.tokens, trainer.run.export_probe)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    adapted.load_state_dict(scaled_adapter(adapted.state_dict(), scale))
    for dtype in ("fp32", "bf16"):
        merge.merge(tmp_path / "run" / "final", tmp_path / dtype, scale=scale, dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), atol=2e-5, rtol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == ("use_rslora" in lora)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weight.bfloat16(), rounded[name]) for name, weight in merged.state_dict().items())


def test_a_merged_model_that_differs_is_not_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_as_loaded", lambda *args: export_is_memory(torch.zeros(1), torch.ones(1), **FP32))
    (tmp_path / ".merged").mkdir()
    with pytest.raises(ExportError, match=r"logits differ by 1 .*; nothing is written"):
        merge.merge(trained / "final", tmp_path / "merged")
    outputs = iter((torch.zeros(1), torch.ones(1)))
    monkeypatch.setattr(merge, "logits_of", lambda model, ids: next(outputs))
    with pytest.raises(ExportError, match=r"is not the base with the adapter: logits differ by 1 .*; nothing is writ"):
        merge.merge(trained / "final", tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and (tmp_path / ".merged").is_dir(), "which merge did not make"


FP32 = {"dtype": torch.float32, "what": "merged"}


def test_an_output_that_cannot_be_written_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/merged cannot be written \(.*Not a directory.*\); name another"):
        merge.merge(trained / "final", tmp_path / "file" / "merged")
    # A disk that is full by the time of the last file.
    monkeypatch.setattr(Tokens, "save", lambda tokens, folder: (folder / "some").touch() or full())

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match=r"merged cannot be written .*No space left"):
        merge.merge(trained / "final", tmp_path / "merged")
    assert not [path.name for path in tmp_path.iterdir() if "merged" in path.name], "nothing is left behind"


def test_what_cannot_be_merged_is_refused(trained: Path, gpt2_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    for scale in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="expected a number above 0 and up to 1"):
            merge.merge(trained / "final", tmp_path / "merged", scale=scale)
    about = json.loads((trained / "final" / "adapter_config.json").read_text())
    shutil.copytree(trained / "final", tmp_path / "dora")
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**about, "use_dora": True}))
    with pytest.raises(ConfigError, match="has DoRA or fully trainable layers"):
        merge.merge(tmp_path / "dora", tmp_path / "merged", scale=0.5)
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        merge.merge(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(ConfigError, match="holds no adapter"):
        merge.merge(gpt2_folder, tmp_path / "merged")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        merge.merge(trained / "final", tmp_path / "taken")
    with pytest.raises(ConfigError, match="does not fit the base"):
        merge.merge(trained / "final", tmp_path / "merged", base=str(llama_folder))
    with pytest.raises(ConfigError, match=r"^--base=.*no such folder"):
        merge.merge(trained / "final", tmp_path / "merged", base=str(tmp_path / "nowhere"))
    assert not (tmp_path / "merged").exists()
