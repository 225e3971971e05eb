"""The device of this process and its arithmetic: whether bf16 is native, and what fp32 products are rounded to.

Knows torch and the variables of its libraries; knows no language model and no config.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

# Instruction sets without bf16 units, as ONEDNN_MAX_CPU_ISA of oneDNN names them.
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")

# Limits of `product_error`, between the errors of fp32 (3e-7, measured), TF32 (5e-4, as its factors have 11 bits) and
# bf16 (4e-3, 8 bits).
_EXACT, _TF32 = 1e-5, 1.5e-3


@contextlib.contextmanager
def casts_kept(module: nn.Module) -> Iterator[None]:
    """Inside the context, without gradients and within one `torch.autocast`, frozen fp32 weights are cast once.

    autocast keeps the casts of leaves that need gradients, until it ends, and casts all others again in every call: of
    a frozen base in fp32, each weight for each token.
    """
    frozen = [p for p in module.parameters() if not p.requires_grad and p.dtype == torch.float32]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside the context, fp32 matrix products are true fp32, whatever `process.tune_process` allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and the launch does not keep the process on the CPU
    (`use_cpu: true`, as in accelerate_configs/cpu.yaml)."""
    kept_off = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")
    return torch.cuda.is_available() and not kept_off


def unused_device() -> str | None:
    """A message if this process computes on the CPU of a machine that has an MPS or XPU device; None otherwise."""
    kinds = {"MPS": torch.backends.mps, "XPU": torch.xpu}
    found = [kind for kind, backend in kinds.items() if backend.is_available()]
    if has_gpu() or not found:
        return None
    return f"this machine has an {found[0]} device, which is not used: the run computes on the CPU"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has native bf16 arithmetic; emulated on a CPU it is up to 100 times slower.

    `RLHF_ACCEL_CPU_BF16` in the environment, 0 or 1, overrides the detection for a CPU.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    override = os.environ.get("RLHF_ACCEL_CPU_BF16", "")
    if device.type != "cpu" or override in ("0", "1"):
        return device.type == "cpu" and override == "1"
    # torch asks the CPU, but oneDNN, which computes, obeys this variable of its own.
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return isa not in _WITHOUT_BF16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not _emulates_in_avx512()


def _emulates_in_avx512() -> bool:
    """Whether the CPU has AVX-512 and no bf16 units: oneDNN accepts bf16 there and torch reports it as supported, but
    products are slower than in fp32."""
    if not hasattr(torch.cpu, "_is_avx512_bf16_supported"):  # an older torch
        return False
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.cpu._is_avx512_supported() and not has_units)


def multiplies_exactly(device: torch.device) -> bool:
    """Whether fp32 matrix products on the device are true fp32 with this process's settings, not rounded to TF32 or
    bf16 by faster units (`process.tune_process` allows that)."""
    return product_error(device) < _EXACT


def product_arithmetic(error: float) -> str:
    """The arithmetic of fp32 products with this `product_error`: `fp32`, or `TF32` or `bf16` if factors are rounded."""
    return "fp32" if error < _EXACT else "TF32" if error < _TF32 else "bf16"


def product_error(device: torch.device) -> float:
    """The largest error of an fp32 matrix product on the device against fp64, as a share of the largest product.

    Measured in each call, in about 10 ms, since it depends on settings of the process that may change.
    """
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    error = ((left.to(device) @ right.to(device)).cpu() - exact).abs().max()
    return float(error / exact.abs().max())
