"""The cache of models that this package downloads or trains: its location, and how a folder is built once.

A cached folder is complete or absent: it is built beside its destination, under a lock, and renamed. Knows no model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import say


def cache_dir() -> Path:
    """`$RLHF_ACCEL_CACHE`, else `$XDG_CACHE_HOME/rlhf_accel`, else `~/.cache/rlhf_accel`."""
    if os.environ.get("RLHF_ACCEL_CACHE"):
        return Path(os.environ["RLHF_ACCEL_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rlhf_accel"


@contextmanager
def built_once(folder: Path, key: str, room: int) -> Iterator[Path | None]:
    """A work folder in which the caller makes `result`, which becomes `folder`; None if another process has built it.

    Raises `ConfigError` naming `key` if the disk has less than `room` megabytes free, or cannot be written.
    """
    fix = "set RLHF_ACCEL_CACHE to a folder that can hold it"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            if folder.is_dir():
                yield None
                return
            # We hold the lock, so any work folder here belongs to a process that was killed.
            for abandoned in folder.parent.glob(f".{folder.name}.work-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free // 10**6
            if free < room:
                raise ConfigError(f"{key}: {folder.parent} has {free} MB free and needs {room} MB; {fix}", key=key)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.work-") as work:
                yield Path(work)
                (Path(work) / "result").rename(folder)
    except OSError as error:
        if error.errno is None:  # raised by transformers for a file that it cannot read
            raise
        raise ConfigError(f"{key}: cannot write {folder} ({error.strerror or error}); {fix}", key=key) from error


def note(message: str) -> None:
    """Print a message to standard error: the standard output of `generate` may be a file."""
    say(message, error=True)
