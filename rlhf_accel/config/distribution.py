"""The distribution that responses are sampled from, temperature and truncation: for files and in words.

Knows only the keys of rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_accel.config.schema import RolloutConfig


def distribution(config: RolloutConfig) -> dict[str, float]:
    """The sampling distribution as evaluation files record it."""
    return {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}


def in_words(drawn_from: Mapping[str, Any]) -> str:
    """A `distribution` in words; top_k and top_p are named only if they truncate.

    >>> in_words({"temperature": 1.0, "top_k": 0, "top_p": 0.5})
    'temperature 1, top_p 0.5'
    """
    whole = {"top_k": 0, "top_p": 1}
    parts = [f"{name} {value:g}" for name, value in drawn_from.items() if value != whole.get(name)]
    return ", ".join(parts)


def truncated(config: RolloutConfig) -> str | None:
    """A warning about the KL if sampling is truncated, since log-probabilities are those of the untruncated policy.

    None if it is not truncated.
    """
    keys = [f"rollout.top_k={config.top_k}"] if config.top_k else []
    keys += [f"rollout.top_p={config.top_p:g}"] if config.top_p < 1 else []
    if not keys:
        return None
    return (
        f"{' and '.join(keys)}: responses are drawn from a truncated distribution, but log-probabilities are those of "
        "the untruncated one, so the reported KL is not that of any policy"
    )
