"""Checks at the borders of a run that cost seconds and are made in every run: what two ways must agree on is compared.

A probe is a pure function: models and texts in, a `Finding` out. Whoever calls it stops the run with the finding's
message, or prints it. Knows models and token ids; knows no config, no rank and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
