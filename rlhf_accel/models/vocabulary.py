"""The vocabulary layer with logits in fp32, whatever the arithmetic of the layers below it.

bf16 has 8 bits: near -100, where GPT-2's logits are, it rounds a logit to a multiple of 0.5, and each log-probability
with it. Knows torch's linear layers. Knows no config and no rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
_HAS_WIDER_RESULT = hasattr(torch.ops.aten.mm, "dtype")  # torch.mm(…, out_dtype=…), from torch 2.8 on
_SLICE = 2**21  # weights that a CPU widens at a time: 8 MiB, which its cache holds


class Fp32LogitsLinear(nn.Linear):
    """A linear layer whose product has the factors as they are and a result in fp32, also under autocast.

    Weights and names are those of `nn.Linear`, so changing the class of a layer is enough; copies keep it. In fp32
    without autocast it is `nn.Linear`. The gradient is computed in half precision, as without this class.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        arithmetic = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        if arithmetic not in HALF:
            return super().forward(x)
        product: Tensor = _Fp32Product.apply(x, self.weight, self.bias, arithmetic)  # type: ignore[no-untyped-call]
        return product


def with_fp32_logits(model: Any) -> None:
    """Let a model that was just loaded compute its logits in fp32, if its vocabulary layer is a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = Fp32LogitsLinear


def has_fp32_logits(model: Any) -> bool:
    """Whether `with_fp32_logits` could; the layer may since have got an adapter."""
    return any(isinstance(layer, Fp32LogitsLinear) for layer in model.get_output_embeddings().modules())


class _Fp32Product(torch.autograd.Function):
    """`x @ weight.T + bias` in fp32, of the factors as they are; its gradient has factors in `arithmetic`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arithmetic: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself: ZeRO-3 takes its values away and brings them back
        ctx.arithmetic = arithmetic
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            product = _fp32_product(x.flatten(0, -2), weight)
        product = product if bias is None else product + bias.float()
        return product.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rounded = grad.to(ctx.arithmetic)
        flat = rounded.flatten(0, -2)
        return (
            (rounded @ weight.to(ctx.arithmetic)).to(x.dtype) if of_x else None,
            (flat.t() @ x.flatten(0, -2).to(ctx.arithmetic)).to(weight.dtype) if of_weight else None,
            grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if of_bias else None,
            None,
        )


def _fp32_product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32:
        return x.float() @ weight.t()
    if x.is_cuda and x.dtype == weight.dtype and _HAS_WIDER_RESULT:  # it sums in fp32 anyway
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    x, rows = x.float(), max(_SLICE // weight.shape[1], 1)
    product = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), rows):
        torch.mm(x, weight[start : start + rows].float().t(), out=product[:, start : start + rows])
    return product
