"""Locks of DeepSpeed's extensions, which torch compiles at first use: a lock that a killed process left is removed.

torch protects a build with a lock file beside it and waits without a limit for its removal. A process that is killed
during a build leaves the file, and every later run on the machine would wait forever. Knows that file and the
processes of this machine; does not import DeepSpeed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock

from rlhf_accel.system.terminal import say

_EXTENSIONS = ("cpu_adam", "deepspeed_shm_comm", "fused_adam", "utils")
_OTHER_MACHINE = 300.0  # seconds that another machine with the same home folder may need for a build


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
