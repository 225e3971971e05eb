"""What responses are drawn from: temperature and truncation, in files and in words. Knows rollout's keys only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_accel.config.schema import RolloutConfig


def distribution(config: RolloutConfig) -> dict[str, float]:
    """What responses are drawn from, as files of figures name it."""
    return {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}


def in_words(drawn_from: Mapping[str, Any]) -> str:
    """A `distribution` for people: what truncates only where it does.

    >>> in_words({"temperature": 1.0, "top_k": 0, "top_p": 0.5})
    'temperature 1, top_p 0.5'
    """
    whole = {"top_k": 0, "top_p": 1}
    parts = [f"{name} {value:g}" for name, value in drawn_from.items() if value != whole.get(name)]
    return ", ".join(parts)


def truncated(config: RolloutConfig) -> str | None:
    """What to know of a KL where responses are drawn from less than what is scored; None where they are not."""
    keys = [f"rollout.top_k={config.top_k}"] if config.top_k else []
    keys += [f"rollout.top_p={config.top_p:g}"] if config.top_p < 1 else []
    if not keys:
        return None
    return (
        f"{' and '.join(keys)}: responses are drawn from a part of the distribution whose log-probabilities are taken, "
        "so the KL that is reported is that of no policy"
    )
