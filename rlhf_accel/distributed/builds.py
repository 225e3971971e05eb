"""DeepSpeed's extensions, which torch compiles at first use: the tools that this needs, and locks left behind.

torch protects a build with a lock file beside it and waits without a limit for its removal. A process that is killed
during a build leaves the file, and every later run on the machine would wait forever. Knows that file, the compilers
and the processes of this machine.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock

from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import say

_EXTENSIONS = ("cpu_adam", "deepspeed_shm_comm", "fused_adam", "utils")
_OTHER_MACHINE = 300.0  # seconds that another machine with the same home folder may need for a build


def check_tools(zero: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if this `zero_optimization` offloads the optimizer and a tool is missing here with which
    DeepSpeed compiles its AdamW for that. Otherwise the run would fail once its models are loaded."""
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") == "none" or _is_built():
        return
    missing = [name for name in (os.environ.get("CXX") or "c++", "ninja") if shutil.which(name.split()[0]) is None]
    if _needs_nvcc() and not _has_nvcc():
        missing.append("nvcc (of the CUDA toolkit in CUDA_HOME)")
    if missing:
        raise ConfigError(
            f"zero_optimization.offload_optimizer: DeepSpeed compiles its AdamW for the CPU, which needs "
            f"{' and '.join(missing)}; install what is missing, or launch without offload",
            key="zero_optimization.offload_optimizer",
        )


def _is_built() -> bool:
    """Whether this DeepSpeed was installed with its AdamW for the CPU (DS_BUILD_CPU_ADAM=1)."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("cpu_adam"))


def _needs_nvcc() -> bool:
    """Whether this DeepSpeed builds its AdamW as a CUDA extension, as it did before 0.19."""
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    return torch.version.cuda is not None and torch.cuda.is_available() and issubclass(CPUAdamBuilder, CUDAOpBuilder)


def _has_nvcc() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME  # slow to import

    return CUDA_HOME is not None and shutil.which(f"{CUDA_HOME}/bin/nvcc") is not None


def remove_abandoned_locks(patience: float = _OTHER_MACHINE) -> None:
    """Remove each lock of a DeepSpeed extension that no process of this machine holds, once it is `patience` seconds
    old. Every rank calls this before DeepSpeed may build."""
    for lock in _locks():
        announced = False
        while (age := _abandoned_for(lock)) is not None:
            if age > patience:
                _remove(lock, patience)
                break
            if not announced:
                say(
                    f"{lock}: an unfinished DeepSpeed extension that no process here builds; waiting up to "
                    f"{patience - age:.0f} s in case another machine that shares the folder is building",
                    error=True,
                )
                announced = True
            time.sleep(1.0)


def _locks() -> Iterator[Path]:
    """The lock files in the folders where torch builds DeepSpeed's extensions."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is None:
        from torch.utils.cpp_extension import get_default_build_root  # slow to import

        roots = list(Path(get_default_build_root()).glob("*"))  # one for each version of Python and CUDA
    else:
        roots = [Path(named)]
    for root in roots:
        yield from (lock for name in _EXTENSIONS if (lock := root / name / "lock").exists())


def _abandoned_for(lock: Path) -> float | None:
    """The age in seconds of a lock that no process here holds open; None if one does, or if there is no lock."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
    return None if _is_held(lock) else age


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as torch has during the whole build."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(file.path == path for file in process.open_files()):
                return True
    return False


def _remove(lock: Path, patience: float) -> None:
    # Checked again under a lock of our own: another rank may have removed it, and be building under a new one.
    with FileLock(lock.with_name("abandoned.lock")):
        age = _abandoned_for(lock)
        if age is not None and age > patience:
            say(f"{lock}: removed, left by a build that was killed", error=True)
            lock.unlink(missing_ok=True)
