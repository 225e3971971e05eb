"""Reward functions of the device check."""

from __future__ import annotations

import math
from typing import Any


def length(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def nan_after_the_first_calls(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """Finite for the few that it is tried out on."""
    return [1.0 if len(prompts) == 2 else math.nan] * len(prompts)
