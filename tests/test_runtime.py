"""Process settings and global random numbers."""

from __future__ import annotations

import random
import resource

import numpy as np
import pytest
import torch

from rlhf_accel import runtime


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.random(), float(torch.rand(()))


def test_global_random_numbers_follow_all_the_numbers_given() -> None:
    runtime.reseed(1, 2, 3)
    first = drawn()
    assert drawn() != first
    runtime.reseed(1, 2, 3)
    assert drawn() == first
    for others in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2)):
        runtime.reseed(*others)
        assert not set(drawn()) & set(first), others


def test_peak_memory_holds_what_was_taken_and_given_back() -> None:
    before = runtime.peak_resident_mib()
    assert before == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, rel=0.5)
    taken = torch.ones(2**20, int(before) // 4 + 64)  # as much again as the peak, and 256 MiB
    del taken
    assert runtime.peak_resident_mib() > before + 100


@pytest.mark.usefixtures("exact_fp32")
def test_exact_products_are_told_from_rounded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, exact = torch.device("cpu"), torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32:  # as bf16 units do
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return exact(left, right)

    runtime.multiplies_exactly.cache_clear()
    assert runtime.multiplies_exactly(cpu)
    runtime.multiplies_exactly.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not runtime.multiplies_exactly(cpu)
    runtime.multiplies_exactly.cache_clear()
