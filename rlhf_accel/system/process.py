"""Settings of this process: memory allocation and matmuls of torch, global random numbers, noise of libraries.

Knows torch, the C library and the switches of the libraries; knows no config, no model and no rank.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import warnings

import numpy as np
import torch

from rlhf_accel.system.arithmetic import has_gpu

# Variables of torch's allocator of GPU memory: the name in all versions, and that in newer ones.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Numbers of mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_process(matmul_precision: str = "medium") -> None:
    """Make torch faster, and let it waste less memory; results change by rounding at most.

    Call it once at the start of a command, before any tensor is made. It can be called again, and does no harm where it
    has no effect.

    - Memory, without a GPU: by default glibc takes every large tensor from the kernel (mmap) and returns it when it is
      freed, so each training step faults all of its activations in again, 4 KiB at a time. Without mmap and trimming
      the pages stay with the process (mallopt(3), "M_MMAP_MAX", "M_TRIM_THRESHOLD", "M_TOP_PAD").
    - Memory, on a GPU: the host's is given back. torch's allocator of the GPU's gets segments that can grow
      ("expandable_segments" in PyTorch's notes on CUDA): tensors whose size changes from batch to batch leave holes in
      fixed ones. A setting in the environment is kept.
    - Matmuls: `matmul_precision` is passed to torch.set_float32_matmul_precision. With "medium", fp32 matmuls on a CPU
      use oneDNN instead of MKL, which is faster with AVX-512; with AVX2 both settings select the same kernel. Where the
      CPU has bf16 units, oneDNN may round the factors to bf16, as a GPU rounds them to TF32. "highest" forbids that;
      `arithmetic.product_error` measures the effect.
    """
    if has_gpu():
        if torch.version.cuda is not None and sys.platform == "linux" and not os.environ.keys() & set(_ALLOCATOR):
            os.environ[_ALLOCATOR[0]] = "expandable_segments:True"  # read when the GPU's memory is first used
    elif sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_M_TOP_PAD, 64 * 2**20)
    torch.set_float32_matmul_precision(matmul_precision)


def reseed(*numbers: int) -> None:
    """Seed the global random numbers of Python, NumPy and torch, which dropout and reward functions use.

    Called at the start of each step, so that a run resumed there draws the same numbers.
    """
    python, of_numpy, of_torch = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(of_numpy)
    torch.manual_seed(of_torch)


def quiet_libraries() -> None:
    """Turn off the progress bars that transformers and datasets show for each file they read or write, but not those of
    downloads, and their warnings about each other's deprecated names."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
