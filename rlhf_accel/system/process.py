"""Process settings that make torch faster on a CPU and change no result beyond rounding.

Knows torch, the C library and the libraries' switches; knows no config, no model and no rank.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
import transformers

# mallopt's parameter numbers, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

# Instruction sets below bf16 units, as oneDNN's ONEDNN_MAX_CPU_ISA names them.
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


def tune_process(matmul_precision: str = "medium") -> None:
    """Call once at the start of a command, before tensors are made. Safe to call again, and where it has no effect.

    - Kept pages: by default glibc takes every large tensor from the kernel (mmap) and gives it back when it is freed,
      so each training step faults all its activations in again, 4 KiB at a time. With no mmap and no trimming the
      pages stay with the process (mallopt(3), "M_MMAP_MAX", "M_TRIM_THRESHOLD", "M_TOP_PAD").
    - Matmuls: `matmul_precision` is that of torch.set_float32_matmul_precision. "medium" lets fp32 matmuls on a CPU go
      through oneDNN instead of MKL, the faster one with AVX-512; with AVX2 both settings lead to the same kernel. Where
      the CPU has bf16 units, oneDNN may round the factors to bf16, as a GPU to TF32. "highest" does not;
      `product_error` measures what came of it.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_M_TOP_PAD, 64 * 2**20)
    torch.set_float32_matmul_precision(matmul_precision)


def peak_resident_mib() -> float:
    """The most memory that this process has had resident so far, in MiB.

    On Linux from /proc, since getrusage's figure starts at what the parent process had.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def free_memory() -> int:
    """Bytes that this process can still take: the machine's, or less in a container or a job that has a limit."""
    return max(min([psutil.virtual_memory().available, *_free_in_cgroups()]), 0)


_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of versions 2 and 1: limit, usage, and the file pages in memory.stat that the kernel gives up first. These count as
# used, so a job that has read or written large files seems full.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _free_in_cgroups() -> Iterator[int]:
    """What the limit of each control group of this process leaves: its own and those above it."""
    with suppress(OSError):
        for line in _CGROUP.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base, names = (_CGROUPS / "memory", _V1) if controllers else (_CGROUPS, _V2)
            place = base / path.lstrip("/")
            for group in (place, *place.parents):
                if group.is_relative_to(base):
                    with suppress(OSError, ValueError):  # not there, or "max"
                        yield _free_in(group, *names)


def _free_in(group: Path, limit: str, usage: str, cached: str) -> int:
    most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
    kept = [line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()]
    return most - used + sum(int(size) for name, size in kept if name == cached)


def reseed(*numbers: int) -> None:
    """Set the global random numbers of Python, NumPy and torch from these: dropout's, and those of a reward function.

    Done at the start of each step, so that a run which goes on there draws the same.
    """
    python, of_numpy, of_torch = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(of_numpy)
    torch.manual_seed(of_torch)


def quiet_libraries() -> None:
    """Turn off the bars that transformers and datasets draw for each file they read or write, while downloads keep
    theirs, and what the libraries say to each other about deprecated names."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def has_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and the launch does not keep it on the CPU
    (`use_cpu: true`, as in accelerate_configs/cpu.yaml)."""
    kept_off = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")
    return torch.cuda.is_available() and not kept_off


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic of its own; elsewhere it is emulated, on a CPU up to 100 times slower.

    For a CPU, `RLHF_ACCEL_CPU_BF16` in the environment, 0 or 1, decides what is assumed whatever the CPU has.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    assumed = os.environ.get("RLHF_ACCEL_CPU_BF16", "")
    if device.type != "cpu" or assumed in ("0", "1"):
        return device.type == "cpu" and assumed == "1"
    # torch asks the CPU, and oneDNN, which computes, heeds this variable of its own.
    within = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return within not in _WITHOUT_BF16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not _emulates_in_avx512()


def _emulates_in_avx512() -> bool:
    """Whether the CPU has AVX-512 and no bf16 units: there oneDNN takes bf16 and torch reports it as supported, but the
    products are slower than in fp32."""
    if not hasattr(torch.cpu, "_is_avx512_bf16_supported"):  # an older torch
        return False
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.cpu._is_avx512_supported() and not has_units)


# Of `product_error`, between what was measured or follows: fp32 3e-7, TF32 5e-4 (11 bits of a factor), bf16 4e-3 (8).
_EXACT, _TF32 = 1e-5, 1.5e-3


def multiplies_exactly(device: torch.device) -> bool:
    """Whether fp32 matrix products on the device are true fp32 with this process's settings, and not rounded to TF32 or
    bf16 on their way through faster units (`tune_process` allows that)."""
    return product_error(device) < _EXACT


def product_arithmetic(error: float) -> str:
    """What fp32 factors are rounded to where `product_error` is this: `fp32` for not at all, `TF32` or `bf16`."""
    return "fp32" if error < _EXACT else "TF32" if error < _TF32 else "bf16"


def product_error(device: torch.device) -> float:
    """The largest error of an fp32 matrix product on the device against fp64, as a share of the largest product.

    Measured anew in each call, in some 10 ms: it depends on settings of the process that may change.
    """
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    error = ((left.to(device) @ right.to(device)).cpu() - exact).abs().max()
    return float(error / exact.abs().max())
