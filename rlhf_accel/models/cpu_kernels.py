"""Matrix products that a CPU does faster than torch's own choice of kernel; the same result up to rounding.

Knows torch's linear layers and oneDNN; knows no config and no rank. Whatever does not fit (a GPU, other dtypes,
autocast, weights that ZeRO-3 has cut, a torch without these operators) goes the plain way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_WORTH_PACKING = 2**16  # weights; smaller layers spend their time elsewhere


@functools.cache
def has_onednn() -> bool:
    """Whether torch has oneDNN's linear layer, which torch.compile uses on CPUs, and the packing of its weights."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_linear_pointwise")
        and hasattr(operators, "_reorder_linear_weight")
    )


@contextlib.contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Linear layers with their weights laid out for oneDNN, for many small products without gradients: decoding.

    The layout fits batches of `rows`. Packing reads and writes each weight once, and the copies take as much memory as
    the model while the context lasts. The weights must not change meanwhile.
    """
    quickened: list[Any] = []
    try:
        for layer, weight in _worth_packing(model):
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            layer.forward = functools.partial(_linear, weight=laid_out, bias=getattr(layer, "bias", None))
            quickened.append(layer)
        yield
    finally:
        for layer in quickened:
            del layer.forward


def packed_bytes(model: nn.Module) -> int:
    """What the copies of `packed` take, in bytes."""
    return sum(weight.numel() * weight.element_size() for _, weight in _worth_packing(model))


def _worth_packing(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layers that `packed` packs, each with its matrix."""
    if not has_onednn() or torch.is_autocast_enabled("cpu"):
        return
    for layer in model.modules():
        weight = _matrix(layer)
        # One that has a forward of its own already is packed, or hooked by somebody else.
        if weight is not None and weight.numel() >= _WORTH_PACKING and "forward" not in vars(layer):
            yield layer, weight


class VocabularyLinear(nn.Linear):
    """A linear layer with far more outputs than inputs, in which torch's own product is the slower one.

    It differs from `nn.Linear` in no weight and no name, so a layer becomes one by its class alone, and its copies too.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _matrix(self) is None or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        product: Tensor = _OneDNNLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # torch's
        return product


def quicken(layer: nn.Module) -> None:
    """Make a plain linear layer a `VocabularyLinear`; any other stays what it is."""
    if type(layer) is nn.Linear and has_onednn():
        layer.__class__ = VocabularyLinear


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            grad @ weight if of_x else None,
            flat.t() @ x.flatten(0, -2) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _matrix(layer: nn.Module) -> Tensor | None:
    """The layer's matrix, outputs x inputs, if it is a linear layer that oneDNN can do here."""
    if type(layer) not in (nn.Linear, VocabularyLinear, Conv1D):  # others, such as routers, do more than multiply
        return None
    weight: Any = layer.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.ndim != 2 or weight.numel() == 0:
        return None
    matrix: Tensor = weight.t() if isinstance(layer, Conv1D) else weight
    return matrix
