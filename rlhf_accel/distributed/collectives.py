"""Collectives: sums, gathers and broadcasts, called by every rank alike.

Knows tensors, lists and Accelerate; knows no module. Each collective marks this process as waiting (`liveness.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from rlhf_accel.distributed.batching import contiguous_shares
from rlhf_accel.distributed.liveness import waiting
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.transfer import to_device, to_host

T = TypeVar("T")


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise, on the CPU."""
    return sum_and_max_over_ranks(accelerator, values, None)[0]


def max_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise, on the CPU."""
    return sum_and_max_over_ranks(accelerator, None, values)[0]


def sum_and_max_over_ranks(accelerator: Accelerator, sums: Tensor | None, maxima: Tensor | None) -> list[Tensor]:
    """Elementwise sums of `sums` and maxima of `maxima`, without one that is None, on the CPU."""
    found = [values for values in (sums, maxima) if values is not None]
    if accelerator.num_processes > 1:
        with waiting():
            found = []
            if sums is not None:
                found.append(accelerator.reduce(to_device(sums, accelerator.device), "sum"))
            if maxima is not None:
                found.append(accelerator.gather(to_device(maxima, accelerator.device)[None]).amax(0))
    return to_host(found)


def on_all(accelerator: Accelerator, fact: bool) -> bool:
    """Whether a fact holds on every rank. Called for every token, so it does not mark this process as waiting."""
    count = accelerator.reduce(torch.tensor(int(fact), device=accelerator.device), "sum")
    return bool(count == accelerator.num_processes)


def gather_rows(accelerator: Accelerator, rows: Tensor, count: int) -> Tensor:
    """The `count` rows of which every rank gives its contiguous share, in order, on every rank, as CPU tensors."""
    world_size = accelerator.num_processes
    if world_size == 1:
        return rows.cpu()
    longest = -(-count // world_size)
    sent_as = torch.uint8 if rows.dtype == torch.bool else rows.dtype  # gloo gathers no booleans
    padded = torch.zeros(longest, *rows.shape[1:], dtype=sent_as, device=accelerator.device)
    padded[: len(rows)] = rows.to(accelerator.device)
    with waiting():
        gathered = accelerator.gather(padded).cpu().reshape(world_size, longest, *rows.shape[1:])
    shares = contiguous_shares(count, world_size)
    return torch.cat([gathered[rank, : len(share)] for rank, share in enumerate(shares)]).to(rows.dtype)


def gather_list(accelerator: Accelerator, items: Sequence[T]) -> list[T]:
    """The lists of all ranks, in order, on every rank."""
    with waiting():
        return gather_object(list(items)) if accelerator.num_processes > 1 else list(items)


def first_failure(accelerator: Accelerator, problem: str | None) -> str | None:
    """The problem of the first rank that has one, with its number; the same on every rank."""
    for rank, found in enumerate(gather_list(accelerator, [problem])):
        if found is not None:
            return found if accelerator.num_processes == 1 else f"rank {rank}: {found}"
    return None


def from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """The result of `make` on the main process, on every rank.

    An error of `make` is raised on every rank, since the others would wait for the result: `ConfigError` and
    `RunFailed` as they are, any other as a `RunFailed` that names it.
    """
    outcome: list[Any] = [None]
    raised: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome = [make()]
        except Exception as error:
            raised = error
            known = isinstance(error, (ConfigError, RunFailed))
            outcome = [error if known else RunFailed(f"the main process: {type(error).__name__}: {error}")]
    if accelerator.num_processes > 1:
        with waiting():
            broadcast_object_list(outcome)
    if raised is not None:
        raise raised
    if isinstance(outcome[0], (ConfigError, RunFailed)):
        raise outcome[0]
    made: T = outcome[0]
    return made
