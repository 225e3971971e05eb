"""Files that are there whole or not at all, whenever the process or the machine stops.

Knows the disk; knows nothing of what is written.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all. Raises `OSError`."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold what a file holds, or the names in a folder. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(folder: Path, *, like: Path) -> None:
    """Have the disk hold all below a folder, readable by the same people as `like`, one of its files: safetensors makes
    files that nobody else may read. Raises `OSError`."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(like.stat().st_mode)
        flush(path)
