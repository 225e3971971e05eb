"""Rows of JSON in a file that grows: written one per line, read back within limits, cut back to a step.

Knows files; knows no metric and no rank.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_accel.system.errors import ConfigError, why
from rlhf_accel.system.files import Malformed, parse_json, read_bounded, read_tail, replace_text

# Limits of metrics.jsonl and samples.jsonl, which no run exceeds.
_MOST_BYTES, _MOST_ROWS, _LONGEST_ROW = 256 << 20, 500_000, 4 << 20


def finite_or_none(value: Any) -> Any:
    """The value with None in place of each number that is not finite, which JSON cannot hold.

    >>> finite_or_none({"a": [1.0, float("nan")], "b": "x"})
    {'a': [1.0, None], 'b': 'x'}
    """
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that `JsonLines` wrote, and the numbers of torn lines, such as the last one of a file being written.

    Both are empty if there is no file. Raises `ConfigError` if the file is too large.
    """
    return _parse_rows(_text_of_rows(path) if path.is_file() else "")


def read_last_rows(path: Path) -> tuple[list[dict[str, Any]], list[int], bool]:
    """As `read_rows`, but of a large file the last rows only. Also returns whether rows were left out.

    Line numbers count from the first line that is read.
    """
    if not path.is_file():
        return [], [], False
    try:
        text = read_tail(path, _MOST_BYTES).decode("utf-8", errors="replace")
        cut = path.stat().st_size > _MOST_BYTES
    except (OSError, Malformed) as error:
        raise _unreadable(path, error) from None
    if cut:
        text = text.partition("\n")[2]  # the first line is a part of a row
    lines = text.rsplit("\n", _MOST_ROWS + 1)  # the last item follows the last line break
    many = len(lines) > _MOST_ROWS + 1
    rows, torn = _parse_rows("\n".join(lines[1:]) if many else text)
    return rows, torn, cut or many


def _parse_rows(text: str) -> tuple[list[dict[str, Any]], list[int]]:
    rows: list[dict[str, Any]] = []
    torn = []
    # Not splitlines: texts may hold line breaks that JSON does not escape (U+2028).
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line) if len(line) <= _LONGEST_ROW else None
        except Malformed:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn.append(number)
    return rows, torn


def _text_of_rows(path: Path) -> str:
    try:
        text = read_bounded(path, _MOST_BYTES).decode("utf-8", errors="replace")
        if text.count("\n") > _MOST_ROWS:
            raise Malformed(f"more than {_MOST_ROWS} rows")
    except (OSError, Malformed) as error:
        raise _unreadable(path, error) from None
    return text


def _unreadable(path: Path, error: OSError | Malformed) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({why(error)})")


class JsonLines:
    """Appends one JSON object per line, with null for numbers that are not finite.

    Rows that could not be written are kept and written first the next time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[str] = []
        self._whole: int | None = None  # length of the file up to its last whole row, after a failed write

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. Raises `OSError` if it cannot be written; the file then ends with the last whole row."""
        self._pending.append(json.dumps(finite_or_none(row), ensure_ascii=False) + "\n")
        self._append()

    def flush(self) -> None:
        """Write all rows to disk. Raises `OSError` if that fails."""
        if self._pending:
            self._append()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if self._whole is not None and size > self._whole:
                file.truncate(self._whole)
            self._whole = size if self._whole is None else min(size, self._whole)
            text = memoryview("".join(self._pending).encode())
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(self._whole)
                raise
        self._whole = None
        self._pending.clear()

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again, and torn rows after a crash.

        The file is replaced as a whole: a crash leaves the old or the new one. Raises `ValueError` if a row up to
        `step` is torn, `OSError` if the file cannot be replaced.
        """
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not a plain file")
        kept, torn = [], 0
        # Not splitlines: texts may hold line breaks that JSON does not escape (U+2028).
        for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
            try:
                if parse_json(line)["step"] > step:
                    continue
            except (ValueError, TypeError, KeyError, IndexError):
                torn = torn or number
                continue
            if torn:
                raise ValueError(f"line {torn} is torn, and rows up to step {step} follow it")
            kept.append(line + "\n")
        replace_text(self.path, "".join(kept))
