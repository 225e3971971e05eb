"""Writing files and folders atomically, and reading untrusted files within limits of size, depth and number of parts.

A file is there whole or not at all, whenever the process or the machine stops. Knows the disk; knows nothing about the
content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MAX_BYTES = 64 << 20  # of a JSON file
_MAX_DEPTH, _MAX_PARTS, _MAX_DIGITS = 32, 2_000_000, 40


class Malformed(ValueError):
    """A file that is not as expected; the message is one line with the reason, without the file's name."""


def read_bounded(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file. Raises `Malformed` for a device, a pipe or a folder, and for more than `limit`
    bytes; `OSError` if it cannot be read."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise Malformed("not a regular file")
    with path.open("rb") as file:
        return whole(file.read(min(about.st_size, limit) + 1), limit)


def read_tail(path: Path, limit: int) -> bytes:
    """The last `limit` bytes of a regular file, or all of it; raises as `read_bounded`."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise Malformed("not a regular file")
    with path.open("rb") as file:
        file.seek(max(about.st_size - limit, 0))
        return file.read(limit)


def whole(content: bytes, limit: int) -> bytes:
    """The same content; raises `Malformed` if it is longer than `limit`."""
    if len(content) > limit:
        raise Malformed(f"more than {limit} bytes")
    return content


def read_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """The tree in a JSON file; raises as `read_bounded` and `parse_json`."""
    return parse_json(read_bounded(path, limit))


def parse_json(content: str | bytes) -> Any:
    """The tree in a JSON text; raises `Malformed` as `bounded`, or if it is not JSON."""
    try:
        return bounded(json.loads(content, parse_int=_integer))
    except RecursionError:
        raise Malformed("nested too deeply") from None
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"not JSON: {' '.join(str(error).split())}") from None


def bounded(tree: Any, limit: int = _MAX_PARTS) -> Any:
    """The same tree, of dicts, lists and scalars. A part with several references (aliases in YAML) counts each time.

    Raises `Malformed` if it has more than `limit` parts, is nested too deeply, or holds text that cannot be encoded.
    """
    left, rest = limit, [(tree, 0)]
    while rest:
        part, depth = rest.pop()
        left -= 1
        if left < 0 or len(rest) > limit:
            raise Malformed(f"more than {limit} parts")
        if depth > _MAX_DEPTH:
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
            raise Malformed("a number with too many digits")
    return tree


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise Malformed(f"a number with {len(text)} digits")
    return int(text)


def sha256(path: Path) -> str:
    """The hash of a file's content, in hex. Raises `OSError`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a small file atomically. Raises `OSError`."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush(path.parent)


def name_work_folder(place: Path) -> Path:
    """An unused path beside `place`, for a folder that is renamed to `place` once it is complete."""
    return place.with_name(f".{place.name}.work-{secrets.token_hex(4)}")


@contextlib.contextmanager
def work_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, to be renamed to it in the block; if it was not, it is removed at the end. Raises
    `OSError`."""
    folder = name_work_folder(place)
    folder.mkdir(parents=True)  # not by tempfile, whose folders other users cannot read
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_work_folders(parent: Path, name: str = "*") -> None:
    """Remove the work folders that killed processes left for folders of this name. Only for a parent that no other
    process writes to. Raises `OSError`."""
    for left in parent.glob(f".{name}.work-????????"):
        shutil.rmtree(left)


def replace_folder(new: Path, place: Path) -> None:
    """Rename a folder to `place`. An existing folder is removed last; until then it is complete, under its own name or
    as `NAME.old`, or under a similar name if that exists. Raises `OSError`."""
    old = place.with_name(f"{place.name}.old")
    if old.exists():
        old = place.with_name(f"{place.name}.old-{secrets.token_hex(4)}")
    moved = place.exists()
    if moved:
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if moved:
            old.rename(place)
        raise
    flush(place.parent)
    if moved:
        shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Write the content of a file, or the names in a folder, through to the disk. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(folder: Path, *, like: Path) -> None:
    """Write everything below a folder through to the disk, with the permissions of `like`, one of its files: other
    users cannot read what safetensors writes. Raises `OSError`."""
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
