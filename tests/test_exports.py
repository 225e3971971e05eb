"""Exports equal the policy in memory, load without this package, and replace nothing if they are wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from rlhf_accel.commands import doctor
from rlhf_accel.commands.checks.findings import Findings
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed import deepspeed, portable, weights
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models import calls
from rlhf_accel.runs import exports
from rlhf_accel.runs.exports import ExportError
from rlhf_accel.system.errors import RunFailed
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests import forks


def raise_(error: Exception) -> None:
    raise error


def unreachable() -> OSError:
    """The error of transformers if the hub does not answer."""
    error = OSError("We couldn't connect to the hub to load the files")
    error.__cause__ = LocalEntryNotFoundError("no such file in the cache")
    return error


SCALAR = "model.layers.1.layer_scalar"  # a persistent buffer


def scalar(policy) -> float:
    return float(policy.get_buffer(SCALAR))


def test_buffers_are_in_models_checkpoints_and_whole_weights(tiny, gemma4_folder: Path, tmp_path: Path) -> None:
    """Also a buffer that training changed, as a layer that counts or averages would."""
    run = {"total_steps": 1, "save_every": 1, "eval_samples": 0}
    config = tiny(run=run, model={"name_or_path": str(gemma4_folder)}, ppo={"ppo_epochs": 1})
    trainer = PPOTrainer(config)
    policy = trainer.runtime.plain_module.policy
    policy.get_buffer(SCALAR).fill_(2.0)
    trainer.fit()
    policy.model.norm.weight.requires_grad_(False).fill_(0.5)  # frozen parameters are exported too
    trainer.run.recorder.export("final", {}, trainer.setup.tokens, trainer.run.export_probe)
    run_folder = tmp_path / "run"
    final = AutoModelForCausalLM.from_pretrained(run_folder / "final", dtype=torch.float32).eval()
    ids = torch.tensor([[40, 41, 42, 43]])
    assert scalar(final) == 2 and torch.equal(calls.logits_of(final, ids), calls.logits_of(policy, ids))

    raised = {"total_steps": 2, "changes": ["run.total_steps"], "resume": "latest"}
    place = run_folder / "checkpoints" / "step-000001"
    resumed = PPOTrainer(tiny(run={**run, **raised}, model={"name_or_path": str(gemma4_folder)}, ppo={"ppo_epochs": 1}))
    whole = resumed.runtime.plain_module
    assert scalar(whole.policy) == 2
    # The weights for evaluations, and for the policy of a ZeRO-3 rollout.
    resumed.runtime.set_weights({f"policy.{SCALAR}": torch.tensor([3.0])})
    assert scalar(whole.policy) == 3
    stated = exports.exported_weights(whole.policy, config, str(run_folder / "final"))
    resumed.runtime.set_weights({f"policy.{name}": weight for name, weight in stated.items()})
    assert scalar(whole.policy) == 2
    skeleton = deepspeed.skeleton(whole)
    whole.policy.get_buffer(SCALAR).fill_(4.0)
    copies = weights.whole_weights(whole, lambda parameters: [parameters], torch.clone)
    assert scalar(deepspeed.filled(skeleton, copies).policy) == 4

    saved = load_file(place / "learned.safetensors")
    old = {name: weight for name, weight in saved.items() if "layer_scalar" not in name}  # of a version without buffers
    assert len(old) == len(saved) - 2
    save_file(old, place / "learned.safetensors")
    portable.load_weights(whole, place)
    assert scalar(whole.policy) == 4


def test_an_export_without_a_buffer_ends_the_run_and_replaces_nothing(
    tiny, gemma4_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"total_steps": 1, "eval_every": 1, "eval_samples": 2}
    trainer = PPOTrainer(tiny(run=run, model={"name_or_path": str(gemma4_folder)}, ppo={"ppo_epochs": 1}))
    learned = Runtime.trainable_weights
    monkeypatch.setattr(
        Runtime,
        "trainable_weights",
        lambda self, **which: {name: w for name, w in learned(self, **which).items() if SCALAR not in name},
    )
    before = tmp_path / "run" / "best" / "from before"
    before.mkdir(parents=True)
    with pytest.raises(RunFailed) as raised:
        trainer.fit()
    message = str(raised.value)
    assert f"best/ as loaded is not the model in memory: {SCALAR} is not in the folder; logits differ by " in message
    assert "best is as it was before; the last checkpoint is " in message and "step-000001, resume with" in message
    assert before.is_dir()
    assert not [path for path in (tmp_path / "run").iterdir() if ".work-" in path.name or path.name == "final"]


def planted(change: Callable[[Path], None]) -> Callable[..., None]:
    """`save_file` of the value head, which comes after the policy, with a change to the folder instead."""
    return lambda tensors, path: change(path.parent)


def rewrite(name: str, **changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, **changes}))

    return change


def turn_around(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({**weights, name: -weights[name]}, path, {"format": "pt"})


def test_an_adapter_is_loaded_once_and_its_tensors_are_compared_each_time(
    tiny, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tied embeddings, with a layer trained in full, another adapter for the critic, and rsLoRA."""
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"], "use_rslora": True}
    trainer = PPOTrainer(tiny(model={"name_or_path": str(llama_folder), "critic": "adapter"}, lora=lora))
    policy = trainer.runtime.plain_module.policy
    torch.manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    loads = []
    load = exports.load_export
    monkeypatch.setattr(exports, "load_export", lambda *args, **how: loads.append(args) or load(*args, **how))

    def export(name: str, change: Callable[[Path], None] | None = None) -> None:
        with monkeypatch.context() as patch:
            if change is not None:
                patch.setattr(exports, "save_file", planted(change))
            trainer.run.recorder.export(name, {}, trainer.setup.tokens, trainer.run.export_probe)

    with pytest.raises(ExportError, match="but no tensor does: its config"):
        export("best", rewrite("adapter_config.json", use_rslora=False))
    with pytest.raises(ExportError, match=r"lm_head\.lora_A\.default\.weight differs by .*; logits differ by"):
        export("best", turn_around)
    with pytest.raises(ExportError, match=r"best/ cannot be loaded again: \w+"):
        export("best", rewrite("adapter_config.json", base_model_name_or_path=str(tmp_path / "nowhere")))
    export("best")
    assert len(loads) == 4
    with pytest.raises(ExportError, match=r"lm_head\.lora_A\.default\.weight differs by [0-9.]+;"):
        export("best", turn_around)
    export("best")
    assert len(loads) == 4, "an adapter of the same run on the same base: comparing its tensors is enough"
    with pytest.raises(ExportError, match=r"final/ cannot be loaded again: .* its adapter_config.json is not that of"):
        export("final", rewrite("adapter_config.json", use_rslora=False))
    export("final")
    assert len(loads) == 4
    final = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32).eval()
    ids = trainer.run.export_probe.ids
    torch.testing.assert_close(calls.logits_of(final, ids), calls.logits_of(policy, ids))
    assert (calls.logits_of(policy.get_base_model(), ids) - calls.logits_of(final, ids)).abs().max() < 1e-4
    for fault in (torch.OutOfMemoryError("no room"), MemoryError(), ConnectionError("reset"), unreachable()):
        with monkeypatch.context() as patch:
            patch.setattr(exports, "load_export", lambda *args, fault=fault, **how: raise_(fault))
            trainer.run.export_probe._described = None
            export("final")
            assert type(fault).__name__ in str(trainer.run.export_probe.skipped)
            with pytest.raises(ExportError, match=r"lm_head\.lora_A\.default\.weight differs by [0-9.]+;"):
                export("final", turn_around)
    export("final")
    assert trainer.run.export_probe.skipped is None and len(loads) == 5
    monkeypatch.setattr(exports, "free_memory", lambda: 0)
    trainer.run.export_probe._described = None
    with pytest.raises(ExportError, match=r"lm_head\.lora_A\.default\.weight differs by [0-9.]+;"):
        export("final", turn_around)
    export("final")
    assert len(loads) == 5 and "a second model takes 0 GiB" in str(trainer.run.export_probe.skipped)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_adapter_on_a_rounded_base_is_compared_in_its_dtype(tiny, tmp_path: Path, dtype: str) -> None:
    """Also an adapter to start from that was trained on a machine with the base in another folder."""
    lora = {"r": 2, "target_modules": ["c_attn"]}
    first = PPOTrainer(tiny(model={"dtype": dtype}, lora=lora))
    first.run.recorder.export("final", {}, first.setup.tokens, first.run.export_probe)
    rewrite("adapter_config.json", base_model_name_or_path="/elsewhere")(tmp_path / "run" / "final")
    lora["adapter"] = str(tmp_path / "run" / "final")
    second = PPOTrainer(tiny(run={"output_dir": str(tmp_path / "second")}, model={"dtype": dtype}, lora=lora))
    adapter = {
        name: torch.full_like(p, 0.1) for name, p in second.runtime.plain_module.named_parameters() if "default" in name
    }
    second.runtime.set_weights(adapter)
    second.run.recorder.export("final", {}, second.setup.tokens, second.run.export_probe)
    about = json.loads((tmp_path / "second" / "final" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == second.config.model.name_or_path


def test_a_checkpoint_of_which_only_the_text_part_is_loaded_is_reported(
    tiny, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config={**text, "layer_types": ["full_attention"]}, vision_config=vision)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "sees")
    tokenizer.save_pretrained(tmp_path / "sees")
    trainer = PPOTrainer(
        tiny(model={"name_or_path": str(tmp_path / "sees")}, run={"total_steps": 1, "eval_samples": 0})
    )
    warning = "of the qwen3_5 checkpoint only the text part (qwen3_5_text) is loaded, trained and exported; final/ and"
    assert trainer.setup.left_out == f"{warning} best/ are without: vision"
    trainer.fit()
    assert warning in " ".join(capsys.readouterr().out.split())
    assert "Of the qwen3_5 checkpoint only the text part" in (tmp_path / "run" / "final" / "README.md").read_text()
    findings = Findings(lambda line: None)
    with pytest.MonkeyPatch.context() as patch:  # only the first line matters
        patch.setattr(Findings, "checking", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            doctor.examine(findings, trainer.setup)
    assert [found.level for found in findings if warning in found.message] == ["warning"]
    assert PPOTrainer(tiny(run={"output_dir": str(tmp_path / "text")})).setup.left_out is None


LOAD_WITHOUT_US = """
import json, sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

written = {}
for kind, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    auto = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The film", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    written[folder] = ids[0].tolist()
assert not any(name.split(".")[0] == "rlhf_accel" for name in sys.modules)
print(json.dumps(written))
"""


@pytest.fixture
def trained(tiny, exact_fp32):
    """A function that trains a tiny run for a step and returns its trainer."""

    def train(**sections):
        run = {"total_steps": 1, "eval_samples": 0, **sections.pop("run", {})}
        trainer = PPOTrainer(tiny(run=run, **sections))
        trainer.fit()
        return trainer

    return train


def test_final_loads_and_writes_without_this_package(trained, llama_folder, tmp_path):
    kinds = {
        "full": trained(run={"output_dir": str(tmp_path / "full")}),
        "tied": trained(run={"output_dir": str(tmp_path / "tied")}, model={"name_or_path": str(llama_folder)}),
        "adapter": trained(run={"output_dir": str(tmp_path / "adapter")}, lora={"r": 4}, optim={"lr": 0.05}),
    }
    arguments = [text for kind, trainer in kinds.items() for text in (kind, str(trainer.folder / "final"))]
    # In another folder, so that the package could not even be found by chance.
    done = forks.run([sys.executable, "-c", LOAD_WITHOUT_US, *arguments], cwd=tmp_path, bare=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout.splitlines()[-1])
    for trainer in kinds.values():
        ids = torch.tensor(written[str(trainer.folder / "final")])[None]
        prompt = torch.tensor(trainer.setup.tokens.encode(["The film"]))
        assert torch.equal(ids[:, : prompt.shape[1]], prompt)
        policy = trainer.runtime.plain_module.policy
        expected = policy.generate(input_ids=prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(ids, expected)


def test_exported_weights_are_those_of_the_run(trained, gpt2_folder):
    trainer = trained()
    final = AutoModelForCausalLM.from_pretrained(trainer.folder / "final").state_dict()
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    policy = trainer.runtime.plain_module.policy.state_dict()
    assert final.keys() == policy.keys()
    assert all(torch.equal(final[name], policy[name]) for name in policy)
    assert not all(torch.equal(final[name], start[name]) for name in policy)
    head = exports.load_value_head(trainer.folder / "final")
    assert head.keys() == {"value_head.weight", "value_head.bias"}
    assert torch.equal(head["value_head.weight"], trainer.runtime.plain_module.value_head.weight)
    assert head["value_head.weight"].abs().max() > 0


def test_an_exported_adapter_is_that_of_the_run(trained, gpt2_folder):
    trainer = trained(lora={"r": 4}, optim={"lr": 0.05})
    loaded = AutoPeftModelForCausalLM.from_pretrained(trainer.folder / "final").eval()
    ids = torch.tensor(trainer.setup.tokens.encode(["The film is good"]))
    with torch.no_grad():
        policy = trainer.runtime.plain_module.policy
        assert_close(loaded(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()(ids).logits
    assert (loaded(ids).logits - base).abs().max() > 1e-3
    names = {path.name for path in (trainer.folder / "final").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


def test_a_separate_critic_is_exported_whole(trained):
    trainer = trained(model={"critic": "separate"})
    critic = exports.load_value_head(trainer.folder / "final")
    module = trainer.runtime.plain_module
    expected = {name: value for name, value in module.state_dict().items() if not name.startswith("policy.")}
    assert critic.keys() == expected.keys()
    assert "critic.h.0.mlp.c_fc.weight" in critic
    assert all(torch.equal(critic[name], expected[name]) for name in expected)
    # What transformers loads is the policy alone.
    names = load_file(trainer.folder / "final" / "model.safetensors")
    assert not any("critic" in name or "value_head" in name for name in names)


def test_tied_weights_stay_tied(trained, llama_folder):
    trainer = trained(model={"name_or_path": str(llama_folder)})
    assert "lm_head.weight" not in load_file(trainer.folder / "final" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(trainer.folder / "final").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.tensor(trainer.setup.tokens.encode(["The film"]))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.runtime.plain_module.policy(ids).logits)


def test_an_export_replaces_the_one_before(trained, tmp_path):
    trainer = trained()
    module, folder = trainer.runtime.plain_module, tmp_path / "out"
    tokens = Tokens.load(trainer.config.model.name_or_path)
    exports.export(folder, module, module.state_dict(), tokens, "first")
    (folder / "stale.txt").write_text("from before")
    with torch.no_grad():
        module.value_head.bias.fill_(3.0)
    exports.export(folder, module, module.state_dict(), tokens, "second")
    assert (folder / "README.md").read_text() == "second"
    assert not (folder / "stale.txt").exists()
    assert exports.load_value_head(folder)["value_head.bias"].item() == 3.0
    assert [path.name for path in tmp_path.glob(".*")] == []
