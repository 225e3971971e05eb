"""Arithmetic problems with their answers, listed by a fixed rule, for rewards that can be verified.

Knows no random number, no file and no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

SPLITS = ("train", "heldout")


class Problem(NamedTuple):
    kind: str
    """sum, product or larger."""
    text: str
    """The question."""
    answer: int


def arithmetic_problems(split: str) -> list[Problem]:
    """The problems of `train`, or of `heldout`, which has a fifth of them.

    Sums of two numbers up to 20, products of two numbers from 2 to 12, and the larger of two different numbers up to
    20, each in both orders. Problems that differ only in their order are in the same split.

    >>> arithmetic_problems("train")[0]
    Problem(kind='sum', text='What is 1 + 1?', answer=2)
    """
    chosen = {"train": False, "heldout": True}[split]
    return [problem for problem, held in _all() if held == chosen]


def _all() -> Iterator[tuple[Problem, bool]]:
    """Every problem, and whether it is held out."""
    for a in range(1, 21):
        for b in range(1, 21):
            yield Problem("sum", f"What is {a} + {b}?", a + b), _held_out("sum", a, b)
    for a in range(2, 13):
        for b in range(2, 13):
            yield Problem("product", f"What is {a} times {b}?", a * b), _held_out("product", a, b)
    for a in range(1, 21):
        for b in range(1, 21):
            if a != b:
                yield Problem("larger", f"Which is larger, {a} or {b}?", max(a, b)), _held_out("larger", a, b)


def _held_out(kind: str, a: int, b: int) -> bool:
    name = f"{kind} {min(a, b)} {max(a, b)}"
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0
