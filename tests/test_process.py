"""Global random numbers, and settings of memory."""

from __future__ import annotations

import ctypes
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_accel.system import process
from rlhf_accel.system.process import reseed


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.random(), float(torch.rand(()))


def test_global_random_numbers_follow_all_the_numbers_given() -> None:
    reseed(1, 2, 3)
    first = drawn()
    assert drawn() != first
    reseed(1, 2, 3)
    assert drawn() == first
    for others in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2)):
        reseed(*others)
        assert not set(drawn()) & set(first), others


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of glibc's mallopt; the environment sets nothing for torch's allocator, and is restored."""
    calls: list[str] = []
    for name in process._ALLOCATOR:
        monkeypatch.setenv(name, "")  # noted, so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *_: calls.append("mallopt")))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(sys, "platform", "linux")
    return calls


def test_freed_pages_of_the_host_are_kept_on_a_cpu(allocator: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "has_gpu", lambda: False)
    process.tune_process()
    assert allocator and not os.environ.keys() & set(process._ALLOCATOR)


@pytest.mark.parametrize("given", [None, *process._ALLOCATOR])
def test_on_a_gpu_its_segments_grow_unless_the_environment_says_else(
    given: str | None, allocator: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    process.tune_process()
    found = {name: os.environ[name] for name in process._ALLOCATOR if name in os.environ}
    expected = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert found == (expected if given is None else {given: "max_split_size_mb:64"})
    assert not allocator, "freed pages of the host are given back"
