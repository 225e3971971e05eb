"""How a language model of any family is called: the inputs that its forward takes, positions from a mask, and what its
vocabulary layer reads.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from jaxtyping import Int
from torch import Tensor


def position_ids(mask: Int[Tensor, "B L"], first: int = 0) -> Int[Tensor, "B L"]:
    """Positions that count real tokens only, so that padding on the left shifts nothing.

    >>> position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
    [[0, 0, 0, 1], [0, 1, 2, 2]]
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0) + first


def first_position(model: Any) -> int:
    """The position of a text's first token: RoBERTa and its kin count on from their padding id, all others from 0."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    table = getattr(getattr(getattr(base, "base_model", None), "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def accepted(model: Any, **extras: Any) -> dict[str, Any]:
    """Those of the keywords that the model's forward names: models with ALiBi take no position ids, older ones compute
    all logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    return {name: value for name, value in extras.items() if name in known}


@contextlib.contextmanager
def vocabulary_inputs(model: Any) -> Iterator[list[Tensor]]:
    """What the vocabulary layer reads in each call of the model, (B, L, H), appended to the list."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
