"""Matrix products that are faster on a CPU than torch's own choice of kernel, with the same result up to rounding.

Knows torch's linear layers and oneDNN. Knows no config and no rank. Everything else (a GPU, other dtypes, autocast,
weights partitioned by ZeRO-3, a torch without these operators) uses torch's own kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_accel.models.vocabulary import Fp32LogitsLinear

_WORTH_PACKING = 2**16  # weights; packing does not pay for smaller layers


@functools.cache
def has_onednn() -> bool:
    """Whether torch has oneDNN's linear operator, which torch.compile uses on CPUs, and can pack its weights."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_linear_pointwise")
        and hasattr(operators, "_reorder_linear_weight")
    )


@contextlib.contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Pack the weights of linear layers for oneDNN, for many small products without gradients: decoding.

    The layout is chosen for batches of `rows`. Packing reads and writes each weight once, and the copies take as much
    memory as the model inside the context. The weights must not change inside it.
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
    """Size of the copies that `packed` makes, in bytes."""
    return sum(weight.numel() * weight.element_size() for _, weight in _worth_packing(model))


def _worth_packing(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layers that `packed` packs, each with its weight."""
    if not has_onednn() or torch.is_autocast_enabled("cpu"):
        return
    for layer in model.modules():
        weight = _matrix(layer)
        # A layer with a forward of its own is packed already, or hooked by another library.
        if weight is not None and weight.numel() >= _WORTH_PACKING and "forward" not in vars(layer):
            yield layer, weight


class VocabularyLinear(Fp32LogitsLinear):
    """A linear layer with far more outputs than inputs, for which torch's own product in fp32 is slower.

    Weights and names are those of `nn.Linear`, so changing the class of a layer is enough; copies keep it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _matrix(self) is None or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        product: Tensor = _OneDNNLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


def quicken(layer: nn.Module) -> None:
    """Make a linear layer a `VocabularyLinear`; layers of other kinds stay as they are."""
    if type(layer) in (nn.Linear, Fp32LogitsLinear) and has_onednn():
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
    """The layer's weight, outputs x inputs, if it is a linear layer that oneDNN supports here."""
    # Other kinds, such as routers, do more than multiply.
    if type(layer) not in (nn.Linear, Fp32LogitsLinear, VocabularyLinear, Conv1D):
        return None
    weight: Any = layer.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.ndim != 2 or weight.numel() == 0:
        return None
    matrix: Tensor = weight.t() if isinstance(layer, Conv1D) else weight
    return matrix
