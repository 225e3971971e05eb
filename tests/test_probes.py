"""Probes on models that are right, and on models with a fault planted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_accel.models import load_export, logits_of
from rlhf_accel.probes import Finding, export_is_memory, prompt_tokens, rounding_limit
from rlhf_accel.tokens import Tokens
from tests.test_tokens import with_template

IDS = torch.tensor([[40, 41, 42, 43], [7, 8, 9, 10]])


def probe(model, folder: Path) -> Finding:
    """As a caller makes it: the folder loaded again against the model in memory."""
    loaded, lacking = load_export(str(folder), dtype=torch.float32)
    logits = logits_of(model, IDS), logits_of(loaded, IDS)
    state = {"ours": model.state_dict(), "theirs": loaded.state_dict()}
    return export_is_memory(*logits, dtype=torch.float32, lacking=lacking, what="final/", **state)


def test_an_export_that_is_whole_passes_and_one_with_a_fault_names_it(llama_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert probe(model, tmp_path).passed and probe(model, tmp_path).difference < 1e-5
    weights = load_file(tmp_path / "model.safetensors")

    norm = "model.layers.1.input_layernorm.weight"
    save_file(
        {name: w for name, w in weights.items() if name != norm}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model.get_parameter(norm).data.mul_(2)  # trained: no longer what transformers starts it with
    found = probe(model, tmp_path)
    assert not found.passed and f"{norm} is not in the folder; logits differ by " in found.message

    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"{norm} differs by 1; logits differ by " in probe(model, tmp_path).message
    model.get_parameter(norm).data.div_(2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    found = probe(model, tmp_path)
    assert not found.passed and "though no tensor does: its config.json" in found.message


def test_the_limit_follows_from_the_dtype_and_the_size_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_accel.probes.multiplies_exactly", lambda device: True)
    logits = torch.tensor([[-100.0, 50.0, torch.finfo(torch.float32).min]])
    limits = [rounding_limit(logits, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert limits == pytest.approx([0.01, 1, 6]), "a padded vocabulary's -3e38 counts as no size"
    one = torch.tensor([[torch.inf, 1.0]])
    assert export_is_memory(one, one, dtype=torch.float32).passed
    assert not export_is_memory(one, torch.tensor([[torch.inf, torch.nan]]), dtype=torch.float32).passed
    assert "logits are (1, 2), in memory (1, 3)" in export_is_memory(logits, one, dtype=torch.float32).message


class OldTokens(Tokens):
    """Faults that were in a release, planted again."""

    def __init__(self, tokenizer: Any, fault: str) -> None:
        super().__init__(tokenizer)
        self.fault = fault
        if fault == "prefix cut":
            around = tokenizer("")["input_ids"]
            self.prefix = around[:1] if around[:1] == [tokenizer.bos_token_id] else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        own = self.tokenizer(list(texts))["input_ids"]
        plain = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = {"EOS at the end": own, "BOS twice": [self.prefix + ids for ids in plain], "prefix cut": None}
        return rows[self.fault] or super().encode(texts)


TEXTS_READ = ["A good film", "bad", "<s>A good film", "naïve 日本"]


@pytest.mark.parametrize("single", ["<s> $A", "[gMASK] <s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_tokens_that_the_policy_reads_are_the_tokenizers(single: str) -> None:
    tokens = Tokens(with_template(single, bos_token="<s>", eos_token="</s>", mask_token="[gMASK]"))
    found = prompt_tokens(tokens.tokenizer, TEXTS_READ, tokens.encode(TEXTS_READ))
    assert found.passed and found.message == "prompt tokens: the policy reads 4 texts as the tokenizer does"


@pytest.mark.parametrize(
    ("single", "fault", "wrong", "part"),
    [
        ("[gMASK] <s> $A", "prefix cut", 4, "'A good film' should be [gMASK] <s> A Ġgood"),
        ("<s> $A", "BOS twice", 1, "'<s>A good film' should be <s> A Ġgood Ġfilm and is <s> <s> A"),
        ("$A </s>", "EOS at the end", 4, "and is A Ġgood Ġfilm </s>: what"),
    ],
)
def test_other_tokens_for_the_policy_are_found(single: str, fault: str, wrong: int, part: str) -> None:
    tokenizer = with_template(single, bos_token="<s>", eos_token="</s>", mask_token="[gMASK]")
    found = prompt_tokens(tokenizer, TEXTS_READ, OldTokens(tokenizer, fault).encode(TEXTS_READ))
    assert not found.passed and found.difference == wrong
    assert found.message.startswith(f"prompt tokens: {wrong} of 4 texts reach the policy in other tokens")
    assert part in found.message and len(found.message.splitlines()) == 1
