"""Files that are there whole or not at all, whenever the process or the machine stops.

Knows the disk; knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
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


def name_work_folder(place: Path) -> Path:
    """A path beside `place` that nothing has, for a folder that is renamed to it once it is whole."""
    return place.with_name(f".{place.name}.work-{secrets.token_hex(4)}")


@contextlib.contextmanager
def work_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, to be renamed to it; what is left of it when the block ends is removed. Raises
    `OSError`."""
    folder = name_work_folder(place)
    folder.mkdir(parents=True)  # not tempfile's, which nobody else may read
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_work_folders(parent: Path, name: str = "*") -> None:
    """Those that killed processes left for folders of such a name: only in a folder that this process alone writes.
    Raises `OSError`."""
    for left in parent.glob(f".{name}.work-????????"):
        shutil.rmtree(left)


def replace_folder(new: Path, place: Path) -> None:
    """Rename a folder to `place`. A folder that is there goes last, and until then is whole, under its name or
    `NAME.old`, or under another if somebody has that. Raises `OSError`."""
    old = place.with_name(f"{place.name}.old")
    if old.exists():
        old = place.with_name(f"{place.name}.old-{secrets.token_hex(4)}")
    made_way = place.exists()
    if made_way:
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if made_way:
            old.rename(place)
        raise
    flush(place.parent)
    if made_way:
        shutil.rmtree(old, ignore_errors=True)


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
