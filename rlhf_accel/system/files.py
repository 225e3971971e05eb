"""Files that are there whole or not at all, whenever the process or the machine stops; and files from elsewhere, read
within bounds: of size, depth and number of parts.

Knows the disk; knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MOST_BYTES = 64 << 20  # of a JSON file
_DEEPEST, _MOST_PARTS, _MOST_DIGITS = 32, 2_000_000, 40


class Malformed(ValueError):
    """A file is not what it should be: one line that says why, without the file's name."""


def read_bounded(path: Path, most: int = MOST_BYTES) -> bytes:
    """What a plain file holds. Raises `Malformed` for a device, a pipe or a folder, and for more than `most` bytes;
    `OSError` if it cannot be read."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise Malformed("not a plain file")
    with path.open("rb") as file:
        return whole(file.read(min(about.st_size, most) + 1), most)


def read_tail(path: Path, most: int) -> bytes:
    """The last `most` bytes of a plain file, or all of it; raises as `read_bounded`."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise Malformed("not a plain file")
    with path.open("rb") as file:
        file.seek(max(about.st_size - most, 0))
        return file.read(most)


def whole(content: bytes, most: int) -> bytes:
    """The content, which is all of it if it is no longer than `most`; else raises `Malformed`."""
    if len(content) > most:
        raise Malformed(f"more than {most} bytes")
    return content


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """The tree in a JSON file; raises as `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path, most))


def parse_json(content: str | bytes) -> Any:
    """The tree in a text; raises `Malformed` as `bounded`, or if it is not JSON."""
    try:
        return bounded(json.loads(content, parse_int=_integer))
    except RecursionError:
        raise Malformed("nested too deeply") from None
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"not JSON: {' '.join(str(error).split())}") from None


def bounded(tree: Any, most: int = _MOST_PARTS) -> Any:
    """The tree, whose parts are counted as often as they are referred to (YAML has aliases).

    Raises `Malformed` if it has more than `most` parts, is too deep, or holds text that cannot be written.
    """
    left, rest = most, [(tree, 0)]
    while rest:
        part, depth = rest.pop()
        left -= 1
        if left < 0 or len(rest) > most:
            raise Malformed(f"more than {most} parts")
        if depth > _DEEPEST:
            raise Malformed("nested too deeply")
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError:
                raise Malformed("half a character (a lone surrogate)") from None
        elif isinstance(part, dict):
            rest += [(item, depth + 1) for pair in part.items() for item in pair]
        elif isinstance(part, (list, tuple, set)):
            rest += [(item, depth + 1) for item in part]
        elif isinstance(part, int) and part.bit_length() > 140:
            raise Malformed("a number of too many digits")
    return tree


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise Malformed(f"a number of {len(text)} digits")
    return int(text)


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


def failure(work: Callable[[], None]) -> str | None:
    """Why the work could not write its files, None if it could. Other errors are raised."""
    try:
        work()
    except OSError as error:
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except SafetensorError as error:
        return str(error)
    return None
