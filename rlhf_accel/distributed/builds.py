"""Locks of DeepSpeed's extensions, which torch compiles at first use: one that a killed process left is removed.

torch guards a build with a file beside it and waits, without a limit, for that file to go. A process that is killed
while it builds leaves the file, and every later run on the machine would wait for ever. Knows that file and the
processes of this machine; knows no DeepSpeed.
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
_OTHER_MACHINE = 300.0  # seconds that a process of another machine, in a shared home, is given for a build


def remove_abandoned_locks(patience: float = _OTHER_MACHINE) -> None:
    """Remove each lock of a DeepSpeed extension that no process of this machine holds and that is older than
    `patience` seconds; a younger one is waited for. Every rank calls this before DeepSpeed may build."""
    for lock in _locks():
        told = False
        while (age := _abandoned_for(lock)) is not None:
            if age > patience:
                _remove(lock, patience)
                break
            if not told:
                say(
                    f"{lock}: an unfinished build of DeepSpeed's, by no process of this machine; waiting up to "
                    f"{patience - age:.0f} s in case another machine that shares the folder is building",
                    error=True,
                )
                told = True
            time.sleep(1.0)


def _locks() -> Iterator[Path]:
    """The lock files of DeepSpeed's extensions, where torch builds them."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is None:
        from torch.utils.cpp_extension import get_default_build_root  # slow to import

        roots = list(Path(get_default_build_root()).glob("*"))  # one for each version of Python and CUDA
    else:
        roots = [Path(named)]
    for root in roots:
        yield from (lock for name in _EXTENSIONS if (lock := root / name / "lock").exists())


def _abandoned_for(lock: Path) -> float | None:
    """The age in seconds of a lock that no process here holds open; None if one does, or if the lock is gone."""
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
    return None if _is_held(lock) else age


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as torch's builder has until it is done."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(file.path == path for file in process.open_files()):
                return True
    return False


def _remove(lock: Path, patience: float) -> None:
    # Looked at again under a lock of ours: another rank may have removed it, and be building under a new one.
    with FileLock(lock.with_name("abandoned.lock")):
        age = _abandoned_for(lock)
        if age is not None and age > patience:
            say(f"{lock}: removed, left by a build that was killed", error=True)
            lock.unlink(missing_ok=True)
