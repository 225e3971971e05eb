"""Checks at the borders of a run that cost seconds and are made in every run: what two ways must agree on is compared.

A probe is a pure function: models and texts in, a `Finding` out. Whoever calls it stops the run with the finding's
message, or prints it. Knows models and token ids; knows no config, no rank and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_accel.runtime import multiplies_exactly


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a probe found: `difference` is the largest one that it measured, in `unit`, `limit` the most that rounding
    explains, and `message` one line that names what was compared and, where it failed, the cause to look at."""

    probe: str
    difference: float
    limit: float
    unit: str
    message: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; one that is not a number is not."""
        return self.difference <= self.limit


# Two ways through the same weights: the largest difference of logits that rounding explains, as a share of their size.
# Measured on one device it is below a tenth of these; between a GPU and a CPU it comes near a half.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_ROUNDED_FACTORS = 2e-2  # fp32 whose products the device rounds to TF32 or bf16
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
    """Whether a model that was written and loaded again is the one in memory.

    `memory` and `loaded` are the logits of both for the same tokens, computed in `dtype`. `ours` are tensors in memory
    by name, each of which must be in `theirs` (the state of the loaded model) bit for bit; `lacking` are names of
    tensors that the folder did not hold. A tensor at fault fails the probe whatever the logits are: an expert that no
    token was routed to changes none.
    """
    faults = _tensors_at_fault(ours or {}, theirs or {}, lacking)
    limit = max(rounding_limit(memory, dtype), rounding_limit(loaded, dtype))
    if memory.shape != loaded.shape:
        faults.insert(0, f"logits are {tuple(loaded.shape)}, in memory {tuple(memory.shape)}")
        difference = torch.inf
    else:
        difference = largest_difference(memory, loaded)
    found = f"{what} as loaded gives the logits of the policy in memory up to {difference:.2g} (limit {limit:.2g})"
    if faults:
        found = f"{what} as loaded is not what is in memory: {_named(faults)}; logits differ by {difference:.2g}"
        difference = torch.inf
    elif not difference <= limit:
        found = (
            f"{what} as loaded is not what is in memory: logits differ by {difference:.2g} (limit {limit:.2g}) though "
            "no tensor does: its config.json or adapter_config.json describes another model, or its base is another"
        )
    return Finding(probe="export = memory", difference=difference, limit=limit, unit="logits", message=found)


def tensors_are_memory(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, what: str = "the export"
) -> Finding:
    """`export_is_memory` for the tensors alone: each of `ours` is in `theirs` bit for bit."""
    faults = _tensors_at_fault(ours, theirs, ())
    found = (
        f"{what} as loaded is not what is in memory: {_named(faults)}" if faults else f"{what} holds what is in memory"
    )
    difference = torch.inf if faults else 0.0
    return Finding(probe="export = memory", difference=difference, limit=0.0, unit="of a weight", message=found)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Of two tensors of one shape; where both are the same infinity it is 0, where one is not a number it is nan."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    difference = torch.where(one == other, 0.0, (one - other).abs())
    return float(difference.max()) if difference.numel() else 0.0


def rounding_limit(logits: Tensor, dtype: torch.dtype) -> float:
    """The most by which logits may differ that were computed twice in `dtype` from the same weights."""
    share = _ROUNDING[dtype]
    if dtype == torch.float32 and not multiplies_exactly(logits.device):
        share = _ROUNDED_FACTORS
    sizes = logits.detach().float().abs()
    sizes = sizes[sizes < 1e6]  # models put finfo.min where the vocabulary is padded
    return share * max(float(sizes.max()) if len(sizes) else 0.0, 1.0)


def _named(faults: Sequence[str]) -> str:
    return ", ".join(faults[:_NAMED]) + (f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else "")


def _tensors_at_fault(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], lacking: Sequence[str]) -> list[str]:
    """One phrase for each, those that the folder lacks first."""
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
    """Whether the policy reads of each text what the tokenizer makes of it in a call of its own: all that it puts
    before the text, once even where the text brings it, and nothing of what it appends (T5's EOS), which would end the
    prompt.

    `read` are the ids that the policy reads, a row for each text.
    """
    expected = [_own_tokens(tokenizer, text) for text in texts]
    wrong = [i for i, row in enumerate(read) if list(row) != expected[i]]
    message = f"prompt tokens: the policy reads {len(texts)} texts as the tokenizer does"
    if wrong:
        first, ours = expected[wrong[0]], read[wrong[0]]
        message = (
            f"prompt tokens: {len(wrong)} of {len(texts)} texts reach the policy in other tokens than the tokenizer "
            f"makes of them; {texts[wrong[0]]!r:.40} should be {_spelled(tokenizer, first)} and is "
            f"{_spelled(tokenizer, ours)}: what the tokenizer of model.name_or_path puts before a text is not "
            "understood, or its files disagree"
        )
    return Finding(probe="prompt tokens", difference=len(wrong), limit=0, unit="texts", message=message)


def _own_tokens(tokenizer: Any, text: str) -> list[int]:
    whole = list(tokenizer(text, verbose=False)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    if not plain or not starts:
        return whole
    # Of a text that begins with what the tokenizer puts before it, the call has that twice.
    before = whole[: starts[0]]
    twice = max(n for n in range(len(before) + 1) if plain[:n] == before[len(before) - n :])
    return before + plain[twice:]


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    tokens = tokenizer.convert_ids_to_tokens(list(ids[:_SPELLED]))
    return " ".join(map(str, tokens)) + (" …" if len(ids) > _SPELLED else "")
