"""What sampling returns: empty tensors that are filled in place, and the rows of several passes. Knows torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_accel.system.transfer import to_host


@dataclass(frozen=True, kw_only=True)
class Generations:
    """responses (B, R) int64, R = max_new_tokens, filled up with the pad id; response_mask (B, R), True up to and
    including the stop token; finished (B,), whether a stop ended the response; logprobs (B, R) fp32 in nats of the
    sampled tokens under the policy at that temperature, before top-k and top-p; entropy (B, R) fp32 in nats of the
    distribution of which they are; values (B, R) fp32 of the critic, None where it was not asked. These three are 0
    where masked."""

    responses: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    finished: Bool[Tensor, " B"]
    logprobs: Float[Tensor, "B R"]
    entropy: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"] | None

    @classmethod
    def empty(cls, count: int, length: int, pad_id: int, device: torch.device, *, with_values: bool) -> Generations:
        """Responses without tokens, to be filled in place."""
        zeros = torch.zeros(count, length, device=device)
        return cls(
            responses=torch.full((count, length), pad_id, dtype=torch.int64, device=device),
            response_mask=torch.zeros(count, length, dtype=torch.bool, device=device),
            finished=torch.zeros(count, dtype=torch.bool, device=device),
            logprobs=zeros.clone(),
            entropy=zeros.clone(),
            values=zeros.clone() if with_values else None,
        )

    def rows(self, kept: slice) -> Generations:
        """These rows, on the CPU."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        there = {name: tensor[kept] for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **dict(zip(there, to_host(list(there.values())), strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[Generations]) -> Generations:
        """The rows of all parts, in order."""
        columns: dict[str, Any] = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        joined: dict[str, Any] = {
            name: None if column[0] is None else torch.cat(column) for name, column in columns.items()
        }
        return cls(**joined)
