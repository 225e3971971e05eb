"""Tiny models with tokenizers of their own, made once a session: nothing is downloaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.distributed import liveness
from tests import forks

# Tiny matrices: a second thread costs more than it brings.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """One server of forks for all processes of pytest-xdist, started by their controller. They are its forks too,
    unless coverage is measured, which has to see what is imported."""
    if getattr(config.option, "numprocesses", None):
        forks.start(build=True)
        if not getattr(config.option, "cov_source", None):
            config.option.tx = [f"popen//python={forks.python(forks.folder())}" for _ in config.option.tx]


# By the time that they take, so that no process of pytest-xdist is left with a long file in the end.
LONGEST = [
    *("test_world_size", "test_ppo_trainer", "test_families", "test_nonfinite", "test_reward_trainer", "test_device"),
    *("test_evaluate", "test_recipes", "test_check", "test_errors", "test_doctor", "test_main", "test_exports"),
    *(
        "test_two_nodes",
        "test_reward_texts",
        "test_report",
        "test_resume",
        "test_train_reward_script",
        "test_evaluation",
    ),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: each process of pytest-xdist gets a file at a time (--dist loadfile)."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


TEXTS = [
    "The film is a quiet triumph, and the cast is very good.",
    "A dull, tired and bad story that goes nowhere.",
    "I liked the music more than the plot, but not by much.",
    "Good jokes, good songs and a good heart make it a good night out.",
    "Bad acting and bad lighting; the worst film of the year.",
    "An odd little film about a man, a dog and a boat.",
    "It is long, it is slow, and it is worth every minute.",
    "Nothing in this sequel is as fresh as the first one was.",
]


def make_tokenizer(vocab_size: int = 300, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 2 layers, with dropout in its config as the real one, and EOS but no PAD."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = make_tokenizer(eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with grouped queries, tied embeddings, BOS, EOS and PAD."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma4_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 4, whose layer scales are persistent buffers and differ from initial ones."""
    folder = tmp_path_factory.mktemp("gemma4")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama_folder)
    config = Gemma4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size_per_layer_input=8,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(config)
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa with two labels and a tokenizer that is not the policy's."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = make_tokenizer(
        280, bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>", sep_token="</s>"
    )
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        initializer_range=0.2,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts with a column beside them."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": f"{text} ({i})", "number": i} for i, text in enumerate(TEXTS * 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def share_of_o(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """A trivial reward: how much of the response is the letter o."""
    return [response.count("o") / max(len(response), 1) for response in responses]


def mean_code(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """The mean of the characters' codes, in hundreds: hardly two responses score alike."""
    return [sum(map(ord, response)) / (100 * max(len(response), 1)) for response in responses]


@pytest.fixture
def tiny(gpt2_folder: Path, prompts_file: Path, tmp_path: Path):
    """A function that makes a config of a tiny run, with changes: `tiny(ppo={"ppo_epochs": 1})`."""

    def make(**sections: dict) -> Config:
        tree: dict[str, dict] = {
            "run": {
                "output_dir": str(tmp_path / "run"),
                "total_steps": 2,
                "eval_samples": 4,
                "trackers": [],
                "report": False,
                "precision": "fp32",
            },
            "model": {"name_or_path": str(gpt2_folder), "dtype": "fp32"},
            "data": {"source": str(prompts_file), "prompt_tokens": [2, 6]},
            "rollout": {"batch_size": 8, "max_prompt_tokens": 6, "max_new_tokens": 8},
            "reward": {"function": "tests.conftest:share_of_o", "dtype": "fp32"},
            "ppo": {"ppo_epochs": 2, "num_minibatches": 2, "micro_batch_tokens": 64},
            "optim": {"lr": 1e-3},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        return parse(Config, tree)

    return make


@pytest.fixture(scope="session")
def gpt2_classifier_folder(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the policy's own architecture and tokenizer, with one output."""
    folder = tmp_path_factory.mktemp("gpt2_classifier")
    torch.manual_seed(1)
    config = GPT2Config.from_pretrained(gpt2_folder, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(gpt2_folder).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fp32 products without bf16 rounding, which `tune_process` allows on a CPU that has bf16 units; and Accelerate's
    process-wide state fresh before and after, as at the start of a process."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A function that has this process sent a signal when a run enters a phase."""

    def at(phase: str, number: int = signal.SIGTERM) -> None:
        enter = liveness.Heartbeat.__call__
        sent: list[str] = []

        def entering(self: liveness.Heartbeat, said: str) -> None:
            enter(self, said)
            if said == phase and not sent:
                sent.append(said)
                signal.raise_signal(number)

        monkeypatch.setattr(liveness.Heartbeat, "__call__", entering)

    return at
