"""Copies between the memory of this host and a GPU, with at most one wait of the host. Knows torch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device. To a GPU it is copied from pinned memory, in the order of the GPU's work, so that the
    host does not wait for the work that is running there."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the host's memory, after one wait for all of them."""
    on_gpu = [tensor.device for tensor in tensors if tensor.device.type == "cuda"]
    copies = [tensor.to("cpu", non_blocking=tensor.device.type == "cuda") for tensor in tensors]
    for device in set(on_gpu):
        torch.cuda.current_stream(device).synchronize()
    return copies


def to_host_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Copy the tensor as it is now, in the background; the result waits for the copy alone, and returns it."""
    if tensor.device.type != "cuda":
        now = tensor.clone()
        return lambda: now
    copy = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def result() -> Tensor:
        copied.synchronize()
        return copy

    return result
