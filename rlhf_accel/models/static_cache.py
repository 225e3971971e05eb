"""A key-value cache in tensors that keep their shapes and places, as a CUDA graph of a token's step needs them.

Knows transformers. Knows no sampling and no config.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

# Kinds of attention that read keys by a mask. Others find out which keys count from values on the host, or take no mask
# that is as wide as the cache.
_BY_MASK = ("eager", "sdpa")


class FixedLayer(StaticLayer):  # type: ignore[misc]  # transformers has no types for it
    """Keys and values of `width` columns, of which a pass over one token writes and reads up to `column`.

    Unlike those of transformers' StaticCache, a layer with a sliding window keeps all columns: a window is then a
    matter of the mask, and no number on the host changes from token to token.
    """

    def __init__(self, filled: Any, seen: int, width: int, column: Int[Tensor, 1]) -> None:
        super().__init__(max_cache_len=width)
        self.keys, self.values = (_widened(tensor, seen, width) for tensor in (filled.keys, filled.values))
        self.column = column
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> Any:
        return self.column[0]  # a number on the device: on the host it would have to be read

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.max_cache_len, 0

    def batch_select_indices(self, indices: Int[Tensor, " n"]) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]


def fixed(cache: Any, seen: int, width: int, column: Int[Tensor, 1]) -> Cache:
    """A cache of `width` columns with the `seen` ones of a dynamic cache, whose layers are emptied on the way.

    `column` has the column of the next token, and is to be counted up in place after each.
    """
    layers = []
    for layer in cache.layers:
        layers.append(FixedLayer(layer, seen, width, column))
        layer.keys = layer.values = None  # so that the memory of only one layer is held twice
    return Cache(layers=layers)


def has_plain_layers(cache: Any) -> bool:
    """Whether a cache holds keys and values alone, of which rows can be selected: no state beside them."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def cannot_be_fixed(model: Any, cache: Any) -> str | None:
    """Why this model's cache cannot be `fixed`; None if it can, as far as its kinds of layers and attention tell."""
    settings = model.config.get_text_config(decoder=True)
    kind, family = getattr(settings, "_attn_implementation", None), model.config.model_type
    if type(cache) is not DynamicCache:
        return f"{family} has no cache" if cache is None else f"{family} has a cache of its own, {type(cache).__name__}"
    if not has_plain_layers(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        return f"{family} has a cache of {', '.join(kinds)}"
    if kind not in _BY_MASK:
        return f"its attention is {kind}, and only {' and '.join(_BY_MASK)} read a fixed width"
    return None


def _widened(tensor: Tensor, seen: int, width: int) -> Tensor:
    """The columns of a tensor (n, heads, length, size), the last ones of `seen`, in one of `width` columns."""
    rows, heads, length, size = tensor.shape
    wide = torch.zeros(rows, heads, width, size, dtype=tensor.dtype, device=tensor.device)
    wide[:, :, seen - length : seen] = tensor
    return wide
