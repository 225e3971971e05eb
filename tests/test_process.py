"""Global random numbers, and settings of matmuls."""

from __future__ import annotations

import random

import numpy as np
import torch

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
