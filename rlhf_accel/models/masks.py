"""An attention mask's copy on the host, of which transformers can ask whether anything is padded.

transformers leaves out a mask of ones, so that attention can take a faster kernel. It asks the mask itself, in every
forward pass, so once a token while sampling; of a mask on a GPU the host waits for the answer.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import masking_utils

# Where transformers asks. A version that lacks one of them asks the mask on the GPU: slower, and the same.
_QUESTIONS = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")


class _Known(threading.local):
    mask: Tensor | None = None


_known = _Known()


@contextlib.contextmanager
def known_mask(mask: Tensor | None, device: torch.device) -> Iterator[None]:
    """Around calls of a model on `device` with this attention mask (B, L), of which `mask` is the host's copy."""
    if mask is None or device.type == "cpu":
        yield
        return
    _listen()
    before, _known.mask = _known.mask, mask.bool()
    try:
        yield
    finally:
        _known.mask = before


def mask_of(query_mask: Bool[Tensor, "B Q"], response_mask: Bool[Tensor, "B R"]) -> Bool[Tensor, "B L"]:
    """The mask with which models read queries followed by responses; L = Q + R."""
    return torch.cat([query_mask, response_mask], dim=1)


@functools.cache
def _listen() -> None:
    for name in _QUESTIONS:
        question = getattr(masking_utils, name, None)
        if question is not None:
            setattr(masking_utils, name, _asking_the_copy(question))


def _asking_the_copy(question: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(question)
    def ask(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        copy = _known.mask
        same = copy is not None and padding_mask is not None and copy.shape == padding_mask.shape
        return question(copy if same else padding_mask, *args, **kwargs)

    return ask
