"""Probes: checks at the borders of a run that take seconds and are made in every run.

A probe compares two computations that must agree. It is a pure function of models and texts that returns a `Finding`;
the caller stops the run with its message, or prints it. Knows models and token ids. Knows no config, no rank and no
file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_accel.system.arithmetic import multiplies_exactly, product_arithmetic, product_error


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a probe.

    `difference` is the largest difference that was measured, in `unit`; `limit` is the largest that rounding explains.
    `message` is one line that names what was compared and, after a failure, the likely cause.
    """

    probe: str
    difference: float
    limit: float
    unit: str
    message: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; nan is not."""
        return self.difference <= self.limit


# The largest difference between logits of the same weights that rounding explains, as a share of their size. On one CPU
# a tenth of these was measured; the rest is a margin for two devices, such as a GPU and a CPU.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_ROUNDED_FACTORS = 2e-2  # fp32 products that the device rounds to TF32 or bf16
_NAMED = 3  # tensors in a message
_SPELLED = 6  # tokens in a message


def export_is_memory(
    memory: Tensor,
    loaded: Tensor,
    *,
    dtype: torch.dtype,
    ours: Mapping[str, Tensor] | None = None,
    theirs: Mapping[str, Tensor] | None = None,
    lacking: Sequence[str] = (),
    what: str = "the export",
) -> Finding:
    """Whether a model that was written and loaded again is the model in memory.

    `memory` and `loaded` are the logits of both for the same tokens, computed in `dtype`. `ours` are tensors in memory
    by name, each of which must be equal to that in `theirs` (the state of the loaded model), bit for bit. `lacking` are
    names of tensors that the folder does not hold. A wrong tensor fails the probe even if the logits agree: an expert
    to which no token was routed changes none.
    """
    faults = _tensors_at_fault(ours or {}, theirs or {}, lacking)
    limit = max(rounding_limit(memory, dtype), rounding_limit(loaded, dtype))
    if memory.shape != loaded.shape:
        faults.insert(0, f"logits have shape {tuple(loaded.shape)}, in memory {tuple(memory.shape)}")
        difference = torch.inf
    else:
        difference = largest_difference(memory, loaded)
    found = f"{what} as loaded gives the logits of the policy in memory up to {difference:.2g} (limit {limit:.2g})"
    if faults:
        found = f"{what} as loaded is not the model in memory: {_named(faults)}; logits differ by {difference:.2g}"
        difference = torch.inf
    elif not difference <= limit:
        found = (
            f"{what} as loaded is not the model in memory: logits differ by {difference:.2g} (limit {limit:.2g}) but "
            "no tensor does: its config.json or adapter_config.json describes another model, or its base is wrong"
        )
    return Finding(probe="export = memory", difference=difference, limit=limit, unit="logits", message=found)


def tensors_are_memory(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, what: str = "the export"
) -> Finding:
    """`export_is_memory` for tensors alone: each of `ours` equals that in `theirs`, bit for bit."""
    faults = _tensors_at_fault(ours, theirs, ())
    found = (
        f"{what} as loaded is not the model in memory: {_named(faults)}"
        if faults
        else f"{what} holds the tensors in memory"
    )
    difference = torch.inf if faults else 0.0
    return Finding(probe="export = memory", difference=difference, limit=0.0, unit="of a weight", message=found)


def scored_alone(
    score: Callable[[Sequence[Any]], Float[Tensor, "B K"]], texts: Sequence[Any], dtype: torch.dtype
) -> Finding:
    """Whether a classifier's logits of a text are the same in a batch with longer and shorter texts as alone.

    `dtype` is that of its computation. Texts should have different lengths.
    """
    together, alone = score(texts), torch.cat([score([text]) for text in texts])
    difference = largest_difference(together, alone)
    return Finding(
        probe="scored alone",
        difference=difference,
        limit=rounding_limit(alone, dtype),
        unit="score",
        message=f"a text's score changes by {difference:.3g} with the texts that it is padded with",
    )


def trained_scored(
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    scores: Float[Tensor, "B K"],
    recorded_ids: Sequence[Sequence[int]],
    recorded_scores: Float[Tensor, "B K"],
    dtype: torch.dtype,
) -> Finding:
    """Whether training texts get the ids and the scores that were recorded in training.

    If ids differ, the difference is the number of such texts, and scores are not compared.
    """
    changed = [i for i, (now, then) in enumerate(zip(ids, recorded_ids, strict=True)) if list(now) != list(then)]
    if changed:
        now, then = ids[changed[0]], recorded_ids[changed[0]]
        place = next((i for i, (a, b) in enumerate(zip(now, then, strict=False)) if a != b), min(len(now), len(then)))
        return Finding(
            probe="trained = scored",
            difference=float(len(changed)),
            limit=0.0,
            unit="texts",
            message=f"the training text {texts[changed[0]]!r:.40} becomes {len(now)} tokens where training made "
            f"{len(then)}, of which number {place + 1} is the first that differs (has {list(now[place : place + 1])}, "
            f"had {list(then[place : place + 1])})",
        )
    each = [largest_difference(now, then) for now, then in zip(scores, recorded_scores, strict=True)]
    worst = max(range(len(each)), key=lambda i: torch.inf if each[i] != each[i] else each[i], default=None)
    message = "no training text was recorded"
    if worst is not None:
        message = (
            f"the training text {texts[worst]!r:.40} scores {scores[worst].tolist()}, and training left "
            f"{recorded_scores[worst].tolist()}"
        )
    return Finding(
        probe="trained = scored",
        difference=0.0 if worst is None else each[worst],
        limit=rounding_limit(scores, dtype),
        unit="score",
        message=message,
    )


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Between two tensors of one shape: 0 where both are the same infinity, nan where one is nan."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    difference = torch.where(one == other, 0.0, (one - other).abs())
    return float(difference.max()) if difference.numel() else 0.0


def rounding_limit(logits: Tensor, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains between logits computed twice in `dtype` from the same weights."""
    share = _ROUNDING[dtype]
    if dtype == torch.float32 and not multiplies_exactly(logits.device):
        share = _ROUNDED_FACTORS
    sizes = logits.detach().float().abs()
    sizes = sizes[sizes < 1e6]  # models use finfo.min for the padding of the vocabulary
    return share * max(float(sizes.max()) if len(sizes) else 0.0, 1.0)


def _named(faults: Sequence[str]) -> str:
    return ", ".join(faults[:_NAMED]) + (f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else "")


def _tensors_at_fault(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], lacking: Sequence[str]) -> list[str]:
    """A phrase for each wrong tensor, those that the folder lacks first."""
    faults = [f"{name} is not in the folder" for name in lacking]
    for name, tensor in ours.items():
        if name in lacking:
            continue
        if name not in theirs:
            faults.append(f"{name} is not in the loaded model")
        elif theirs[name].shape != tensor.shape:
            faults.append(f"{name} is {tuple(theirs[name].shape)}, in memory {tuple(tensor.shape)}")
        elif not torch.equal(theirs[name].cpu(), tensor.cpu()):
            faults.append(f"{name} differs by {largest_difference(theirs[name], tensor):.2g}")
    return faults


def prompt_tokens(tokenizer: Any, texts: Sequence[str], read: Sequence[Sequence[int]]) -> Finding:
    """Whether the policy reads the tokens that the tokenizer itself gives for each text.

    The tokens that it puts before a text count, once even if the text contains them. Those that it appends (T5's EOS)
    do not: they would end the prompt. `read` are the ids that the policy reads, a row per text.
    """
    return _same_tokens(tokenizer, texts, [_own_tokens(tokenizer, text) for text in texts], read)


def chat_tokens(
    tokenizer: Any, conversations: Sequence[Any], read: Sequence[Sequence[int]], options: Mapping[str, Any]
) -> Finding:
    """Whether the policy reads the tokens that `apply_chat_template` itself gives for each conversation, with these
    options for the template. `read` are the ids that the policy reads, a row per conversation."""
    expected = [
        tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False, **options)
        for turns in conversations
    ]
    return _same_tokens(tokenizer, [turns[-1]["content"] for turns in conversations], expected, read)


def _same_tokens(
    tokenizer: Any, texts: Sequence[str], expected: Sequence[list[int]], read: Sequence[Sequence[int]]
) -> Finding:
    wrong = [i for i, row in enumerate(read) if list(row) != expected[i]]
    message = f"prompt tokens: the policy reads {len(texts)} texts as the tokenizer does"
    if wrong:
        first, ours = expected[wrong[0]], read[wrong[0]]
        message = (
            f"prompt tokens: {len(wrong)} of {len(texts)} texts reach the policy as other tokens than the tokenizer "
            f"gives; {texts[wrong[0]]!r:.40} should be {_spelled(tokenizer, first)} and is "
            f"{_spelled(tokenizer, ours)}: what the tokenizer of model.name_or_path puts before a text was not "
            "recognized, or its files disagree"
        )
    return Finding(probe="prompt tokens", difference=len(wrong), limit=0, unit="texts", message=message)


def _own_tokens(tokenizer: Any, text: str) -> list[int]:
    whole = list(tokenizer(text, verbose=False)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    if not plain or not starts:
        return whole
    # If the text starts with the tokens that the tokenizer prepends, the call has them twice.
    before = whole[: starts[0]]
    twice = max(n for n in range(len(before) + 1) if plain[:n] == before[len(before) - n :])
    return before + plain[twice:]


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    tokens = tokenizer.convert_ids_to_tokens(list(ids[:_SPELLED]))
    return " ".join(map(str, tokens)) + (" …" if len(ids) > _SPELLED else "")


# ---------------------------------------------------------------------------------------------------------------------
# fp32 = fp32
# ---------------------------------------------------------------------------------------------------------------------


def fp32_products(device: torch.device) -> Finding:
    """The arithmetic of fp32 matrix products on the device with the settings of this process; it stops no run."""
    error = product_error(device)
    arithmetic = product_arithmetic(error)
    message = f"fp32 matrix products on {device.type} are {arithmetic}: off by {error:.1e} of the largest"
    if arithmetic != "fp32":
        message += "; run.matmul_precision=highest makes them exact, and slower"
    return Finding(
        probe="fp32 = fp32", difference=error, limit=1e-5, unit="share of the largest product", message=message
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rollout = update
# ---------------------------------------------------------------------------------------------------------------------

# In fp32 two computations of a log-probability agree to about 1e-5; a fault (dropout, positions,
# temperature) gives more than 0.01.
_EXACT_RATIO = 1e-3
# Contribution of the layers below the logits to the log-ratio in bf16. Measured between sampling with a KV cache and
# one forward pass: 0.04 nats (root mean square) for SmolLM2-135M, 0.03 for a GPT-2 of 12 layers.
_BELOW = 0.15
# A single token may be off by this many times the rms that is allowed. More than rounding gives to any of millions of
# tokens, since a run must not stop for one unlucky token; less than a wrong token's probability is off.
_CEILING = 20


@dataclass(frozen=True, kw_only=True)
class RatioLimits:
    """What rounding explains of log-ratios between two passes of one model, in nats: their rms, and a ceiling for
    single tokens, which rounding is far from."""

    rms: float
    ceiling: float


def ratio_limits(spacing: Float[Tensor, "*shape"] | None, dtype: torch.dtype) -> RatioLimits:
    """The limits for a policy that computes in `dtype`, from `logit_spacing` of its tokens; None for exact fp32.

    A log-probability is a logit less the log-normalizer, which lies near the largest logit. In each of two passes both
    are rounded to a neighbour, at most half a spacing s away. So the log-ratio is off by up to 2 s. Its four parts
    are at most uniform on [-s/2, s/2] and independent: their standard deviation is sqrt(4/12) s = 0.58 s, and 0.75 s
    leaves a margin of a third. A logit of -100 has s = 0.5 in bf16, which alone gives a ratio of 2.7: no fixed limit
    fits all logits. The rms allows that or the contribution of the layers below, the ceiling both.
    """
    if spacing is None:
        return RatioLimits(rms=_EXACT_RATIO, ceiling=_CEILING * _EXACT_RATIO)
    below = _BELOW * torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    rms = float(spacing.float().square().mean().sqrt())
    return RatioLimits(rms=max(below, 0.75 * rms), ceiling=_CEILING * below + 2 * float(spacing.max()))


def logit_spacing(sizes: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The distance between neighbouring numbers of `dtype` at logits of these sizes.

    >>> logit_spacing(torch.tensor([-100.0, 35.0, 1.0]), torch.bfloat16)
    tensor([0.5000, 0.2500, 0.0078])
    """
    exponent = torch.floor(torch.log2(sizes.float().abs().clamp(min=torch.finfo(torch.float32).tiny)))
    return torch.finfo(dtype).eps * torch.exp2(exponent)


def sampled_is_trained(rms: float, largest: float, limits: RatioLimits, *, recomputed: bool) -> Finding:
    """Whether the update computes the log-probabilities of the rollout, before the first optimizer step.

    `rms` and `largest` are those of the log-ratios of all tokens, in nats. The rms tells a fault from rounding; the
    largest grows with the number of tokens, and only has to be below a ceiling. With `recomputed`, the rollout took its
    log-probabilities from a forward pass like the update's instead of from sampling.
    """
    # One number for both: the larger share of its limit.
    share = max(rms / limits.rms, largest / limits.ceiling) if math.isfinite(rms + largest) else math.nan
    found = (
        f"log-ratios of new to old probability before the first update: {rms:.2g} nats rms (limit {limits.rms:.2g}), "
        f"{largest:.2g} at most (limit {limits.ceiling:.2g})"
    )
    if not share <= 1:
        found += "; the ratio should be 1: the update computes other log-probabilities than the rollout (dropout, "
        found += "padding, positions or temperature)"
        if not recomputed:
            found += "; try rollout.logprobs=recomputed, which takes both from the same pass"
    return Finding(probe="sampled = trained", difference=share, limit=1.0, unit="of the limit", message=found)


def reference_is_policy(kl_k3: float, tokens: float, limits: RatioLimits) -> Finding:
    """Whether policy and reference are the same model before the first update.

    `kl_k3` is the mean in nats per response, `tokens` the mean length of a response. The k3 of a small log-ratio is
    half its square, so rounding explains `tokens` times half the square of `limits.rms`.
    """
    limit = max(_EXACT_RATIO, tokens * limits.rms**2 / 2)
    found = f"KL (k3) of the policy to the reference before the first update: {kl_k3:.2g} nats a response (limit "
    found += f"{limit:.2g})"
    if not abs(kl_k3) <= limit:
        found += "; they are the same model, so it should be 0: the reference differs in weights, dropout or adapter"
    return Finding(probe="reference = policy", difference=abs(kl_k3), limit=limit, unit="nats", message=found)


# ---------------------------------------------------------------------------------------------------------------------
# Values that can reach their returns
# ---------------------------------------------------------------------------------------------------------------------

_PATIENCE = 25.0  # PPO steps; calibrated scores need 5 with the default cliprange_value
_USUAL_CLIPRANGE = 0.2  # used if values are not clipped


def values_in_reach(distance: float, cliprange_value: float | None) -> Finding:
    """Whether the value model can fit the returns soon enough for the policy.

    `distance` is the root mean square of returns - values before the first update. A value that has moved by
    `cliprange_value` from the rollout's gets no more gradient in that step, so the value model needs at least
    distance / cliprange_value steps. Until then its loss, the square, outweighs the policy's in the weights that they
    share and in the norm that is clipped. Scores a hundred times as large halved the gain of 40 steps, with values
    clipped or not; vf_coef=1e-5 restored it.
    """
    steps = distance / (cliprange_value or _USUAL_CLIPRANGE)
    found = f"returns are {distance:.3g} from the values (rms), {steps:.0f} times "
    found += f"ppo.cliprange_value={cliprange_value:g}" if cliprange_value else f"the usual {_USUAL_CLIPRANGE:g}"
    if not steps <= _PATIENCE:
        found += ": the critic needs at least that many steps, and until then its loss outweighs the policy's; set "
        found += "reward.calibrate=true, which gives scores a variance of 1, or lower ppo.vf_coef by far"
    return Finding(probe="values reach returns", difference=steps, limit=_PATIENCE, unit="steps", message=found)
