"""Position ids from a mask, and the number of positions that a model has. Knows no tokenizer and no rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from rlhf_accel.config.schema import Config
from rlhf_accel.models.loading import LanguageModel
from rlhf_accel.system.errors import ConfigError


def position_ids(mask: Int[Tensor, "B L"], first: int = 0) -> Int[Tensor, "B L"]:
    """Positions that count real tokens only, so that padding on the left does not shift them.

    >>> import torch
    >>> position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
    [[0, 0, 0, 1], [0, 1, 2, 2]]
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0) + first


def first_position(model: Any) -> int:
    """The position of a text's first token: RoBERTa and similar models count from their padding id, others from 0."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    table = getattr(getattr(getattr(base, "base_model", None), "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


# Names for the number of positions in configs, including MPT, DBRX and speech decoders. Without such a limit (ALiBi,
# state space models) a text may have any length.
_WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


def window(policy: LanguageModel) -> int | None:
    """The number of tokens that the policy has positions for; None if its config sets no limit."""
    text = policy.config.get_text_config(decoder=True)
    sizes = (getattr(text, name, None) for name in _WINDOWS)
    most = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    return None if most is None else most - first_position(policy)


def check_window(config: Config, policy: LanguageModel, prefix: int) -> None:
    """Raises `ConfigError` if the longest sample, with `prefix` tokens such as BOS, exceeds the policy's positions."""
    most, rollout = window(policy), config.rollout
    needed = prefix + rollout.max_prompt_tokens + rollout.max_new_tokens
    if most is not None and needed > most:
        raise ConfigError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and rollout.max_new_tokens="
            f"{rollout.max_new_tokens} make up to {needed} tokens, and the policy has {most} positions; lower one",
            key="rollout.max_prompt_tokens",
            positions=most,
        )


def check_prompts(
    policy: LanguageModel, texts: Sequence[str], lengths: Sequence[int], new_tokens: int, key: str
) -> None:
    """Raises `ConfigError` with the first of these prompts that exceeds the policy's positions.

    `lengths` are those of the prompts, in tokens, and `new_tokens` is that of a response, which `key` sets.
    """
    most = window(policy)
    for number, (text, length) in enumerate(zip(texts, lengths, strict=True), start=1):
        if most is not None and length + new_tokens > most:
            raise ConfigError(
                f"prompt {number} of {len(texts)} ({text!r:.40}) has {length} tokens, which with {key}={new_tokens} is "
                f"above the policy's {most} positions; shorten it or lower {key}",
                key=key,
                prompt=number,
                positions=most,
            )
