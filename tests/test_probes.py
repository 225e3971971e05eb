"""Probes on correct models, and on models with a planted fault."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.algorithm.kl import k3
from rlhf_accel.algorithm.masked import masked_row_sum
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models import calls, loading, policy_with_value
from rlhf_accel.models.calls import logits_of
from rlhf_accel.models.loading import load_export
from rlhf_accel.models.probes import (
    Finding,
    RatioLimits,
    export_is_memory,
    logit_spacing,
    prompt_tokens,
    ratio_limits,
    reference_is_policy,
    rounding_limit,
    sampled_is_trained,
    values_in_reach,
)
from rlhf_accel.models.vocabulary import with_fp32_logits
from rlhf_accel.rollout import sampling as decoding
from rlhf_accel.rollout.drawing import SamplingSettings
from tests.test_tokenizer import with_template

IDS = torch.tensor([[40, 41, 42, 43], [7, 8, 9, 10]])


def probe(model, folder: Path) -> Finding:
    """The probe as it is called: the loaded folder against the model in memory."""
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
    model.get_parameter(norm).data.mul_(2)  # trained: no longer its initial value
    found = probe(model, tmp_path)
    assert not found.passed and f"{norm} is not in the folder; logits differ by " in found.message

    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"{norm} differs by 1; logits differ by " in probe(model, tmp_path).message
    model.get_parameter(norm).data.div_(2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    found = probe(model, tmp_path)
    assert not found.passed and "but no tensor does: its config.json" in found.message


def test_the_limit_follows_from_the_dtype_and_the_size_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_accel.models.probes.multiplies_exactly", lambda device: True)
    logits = torch.tensor([[-100.0, 50.0, torch.finfo(torch.float32).min]])
    limits = [rounding_limit(logits, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert limits == pytest.approx([0.01, 1, 6]), "the -3e38 of a padded vocabulary does not count"
    one = torch.tensor([[torch.inf, 1.0]])
    assert export_is_memory(one, one, dtype=torch.float32).passed
    assert not export_is_memory(one, torch.tensor([[torch.inf, torch.nan]]), dtype=torch.float32).passed
    assert "logits have shape (1, 2), in memory (1, 3)" in export_is_memory(logits, one, dtype=torch.float32).message


class OldTokens(Tokens):
    """Faults of an earlier release, planted again."""

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
    assert found.message.startswith(f"prompt tokens: {wrong} of 4 texts reach the policy as other tokens")
    assert part in found.message and len(found.message.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Rollout = update
# ---------------------------------------------------------------------------------------------------------------------


def little_gpt2(offset: float) -> GPT2LMHeadModel:
    """With logits of a few units around `offset`, as GPT-2's are around -35 to -112: softmax does not change."""
    torch.manual_seed(0)
    config = GPT2Config(
        **{"vocab_size": 300, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
        **{"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0},
    )
    model = loading.without_dropout(GPT2LMHeadModel(config)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 10.0
        model.lm_head.weight[:, 0] = offset / 10
    return model


# Dtype, offset of the logits, and whether they are fp32 in any case.
HALF = ((0.0, False), (-100.0, False), (-100.0, True))
KINDS = [(torch.float32, 0.0, True), *((torch.bfloat16, *kind) for kind in HALF)]


@pytest.fixture(scope="module", params=KINDS)
def sampled(request: pytest.FixtureRequest) -> tuple:
    """A model, its dtype, its samples from padded prompts, and the limits."""
    dtype, offset, in_fp32 = request.param
    model = little_gpt2(offset).to(dtype)
    if in_fp32:
        with_fp32_logits(model)
    queries = torch.randint(1, 300, (32, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(32, 6, dtype=torch.bool)
    mask[::2, :3] = False
    samples = decoding.sample(
        *(model, queries, mask, decoding.uniforms(0, 1, range(32), 10)),
        SamplingSettings(max_new_tokens=10),
        pad_id=0,
        ended=lambda tokens: torch.zeros(len(tokens), dtype=torch.bool),
    )
    sequences = Sequences(
        queries=queries, query_mask=mask, responses=samples.responses, response_mask=samples.response_mask
    )
    module = policy_with_value.PolicyWithValue(model, None, 1.0)
    sizes = policy_with_value.logit_sizes(module, sequences)
    spacing = None if dtype == torch.float32 else logit_spacing(sizes, torch.float32 if in_fp32 else dtype)
    return module, dtype, sequences, samples.logprobs, ratio_limits(spacing, dtype)


def of_another_pass(sampled: tuple) -> tuple[Finding, torch.Tensor]:
    module, _, sequences, logprobs, limits = sampled
    with torch.no_grad():
        new = module(*calls.model_inputs(sequences)).logprobs
    log_ratios = (new - logprobs)[sequences.response_mask]
    rms, largest = float(log_ratios.square().mean().sqrt()), float(log_ratios.abs().max())
    return sampled_is_trained(rms, largest, limits, recomputed=False), log_ratios


def test_what_rounds_differently_passes(sampled: tuple) -> None:
    found, log_ratios = of_another_pass(sampled)
    assert found.passed, found.message
    kl = float(masked_row_sum(k3(-log_ratios.view(32, -1)), torch.ones(32, 10, dtype=torch.bool)).mean())
    assert reference_is_policy(kl, 10.0, sampled[-1]).passed


def test_dropout_positions_and_temperature_that_differ_are_caught(
    sampled: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, positions = sampled[0], calls.position_ids
    with monkeypatch.context() as patch:
        patch.setattr(calls, "position_ids", lambda mask, first=0: positions(mask) + 1)
        shifted, _ = of_another_pass(sampled)
    with monkeypatch.context() as patch:  # of padding
        patch.setattr(calls, "position_ids", lambda mask, first=0: torch.arange(mask.shape[1]).expand(mask.shape))
        padded, _ = of_another_pass(sampled)
    with monkeypatch.context() as patch:
        patch.setattr(module, "temperature", 0.6)
        tempered, _ = of_another_pass(sampled)
    with monkeypatch.context() as patch:
        patch.setattr(module.policy.transformer.drop, "p", 0.1)
        module.train()
        dropped, _ = of_another_pass(sampled)
        module.eval()
    for name, found in {"shifted": shifted, "padded": padded, "tempered": tempered, "dropped": dropped}.items():
        assert not found.passed, name
        assert "try rollout.logprobs=recomputed" in found.message
    assert of_another_pass(sampled)[0].passed  # restored


def test_the_limits_follow_from_the_spacing_of_logits() -> None:
    sizes = torch.tensor([100.0, 35.0])
    spacing = logit_spacing(sizes, torch.bfloat16)
    assert spacing.tolist() == [0.5, 0.25]
    rms = math.sqrt((0.25 + 0.0625) / 2)
    limits = ratio_limits(spacing, torch.bfloat16)
    assert (limits.rms, limits.ceiling) == pytest.approx((0.75 * rms, 3.0 + 1.0))
    half = ratio_limits(logit_spacing(sizes, torch.float16), torch.float16)  # three bits more
    assert (half.rms, half.ceiling) == pytest.approx((limits.rms / 8, limits.ceiling / 8))
    # One logit of -100 that two passes round to different neighbours: the ratio is off by 0.65 without any fault.
    assert math.exp(0.5) - 1 > 0.5 and sampled_is_trained(0.05, 0.5, limits, recomputed=False).passed
    assert ratio_limits(None, torch.float32) == RatioLimits(rms=1e-3, ceiling=0.02)
    assert ratio_limits(torch.zeros(3), torch.bfloat16).rms == 0.15


def test_one_token_that_rounding_throws_far_stops_no_run() -> None:
    """Of 100,000 tokens some is off by ten times the rms."""
    for limits in (ratio_limits(torch.tensor([1e-5]), torch.bfloat16), ratio_limits(None, torch.float32)):
        usual = limits.rms / 2
        assert sampled_is_trained(usual, 20 * usual, limits, recomputed=True).passed
        assert not sampled_is_trained(2.2 * usual, 2.2 * usual, limits, recomputed=True).passed


def test_one_token_at_fault_is_caught_among_many_and_nothing_finite_is_no_pass() -> None:
    limits = ratio_limits(torch.tensor([0.125]), torch.bfloat16)
    for largest in (-5.0, 5.0):  # of 10,000 tokens: the rms is within its limit
        rms = abs(largest) / 100
        assert rms < limits.rms and not sampled_is_trained(rms, abs(largest), limits, recomputed=True).passed
    assert not sampled_is_trained(math.nan, 0.0, limits, recomputed=True).passed
    assert "recomputed" not in sampled_is_trained(9.0, 9.0, limits, recomputed=True).message
    # 500 tokens in bf16, each off by 0.06 nats rms, have a k3 of 0.9; two different models have more.
    assert reference_is_policy(500 * 0.06**2 / 2, 500.0, limits).passed
    assert not reference_is_policy(8.0, 500.0, limits).passed
    assert not reference_is_policy(2e-3, 500.0, ratio_limits(None, torch.float32)).passed


def test_values_that_cannot_reach_the_returns_in_time_are_reported() -> None:
    for unclipped in (0.2, None):
        assert values_in_reach(1.0, unclipped).passed and values_in_reach(4.9, unclipped).passed
        found = values_in_reach(100.0, unclipped)
        assert (found.passed, found.difference) == (False, 500.0)
        assert "500 times" in found.message and "set reward.calibrate=true" in found.message
    assert values_in_reach(100.0, 20.0).passed and not values_in_reach(math.nan, 0.2).passed
