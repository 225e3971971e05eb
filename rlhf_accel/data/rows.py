"""Rows of local files: the current content of the named file, without cached copies and without guessed types.

Knows JSON, CSV, text and Parquet. Knows no config key and no meaning of a column.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar, overload

import datasets
import pyarrow.parquet

T = TypeVar("T")

_LONGEST_FIELD = 2**31 - 1  # of a CSV file, in characters; many texts exceed Python's limit of 131,072


class Table(Protocol):
    """The common interface of `Rows` and `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]: ...

    @property
    def features(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any: ...

    def select(self, chosen: Iterable[int]) -> Table: ...


@dataclass(frozen=True)
class Rows:
    """Columns of plain Python values, all of the same length; a column may mix types.

    >>> rows = Rows({"text": ["a", "b"], "n": [1, None]})
    >>> rows["n"], rows[[1]], len(rows.select([0]))
    ([1, None], {'text': ['b'], 'n': [None]}, 1)
    """

    columns: dict[str, list[Any]]

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    @property
    def features(self) -> dict[str, None]:
        """No type is known of any column."""
        return dict.fromkeys(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...

    @overload
    def __getitem__(self, key: Sequence[int]) -> dict[str, list[Any]]: ...

    def __getitem__(self, key: str | Sequence[int]) -> list[Any] | dict[str, list[Any]]:
        if isinstance(key, str):
            return self.columns[key]
        return {name: [column[i] for i in key] for name, column in self.columns.items()}

    def select(self, chosen: Iterable[int]) -> Rows:
        return Rows(self[list(chosen)])


def read_file(path: Path, most: int | None = None) -> Table:
    """The first `most` rows of a file whose suffix is one of `READERS`.

    Raises `OSError` or `ValueError` (also `UnicodeDecodeError` and the errors of pyarrow), with the line if known.
    """
    return READERS[path.suffix.lower()](path, most)


def text_lines(content: bytes) -> list[str]:
    r"""Lines of a UTF-8 text, ended by \n or \r\n only (not by a form feed or U+2028), without a byte order mark.

    >>> text_lines("\ufeffone\x0c\r\n\ntwo\u2028three\n".encode())
    ['one\x0c', '', 'two\u2028three', '']
    """
    return [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]


def _text(path: Path, most: int | None) -> Rows:
    lines = (line for line in text_lines(path.read_bytes()) if line.strip())
    return Rows({"text": list(islice(lines, most))})


def _parquet(path: Path, most: int | None) -> Table:
    # Not by read_table, which turns folder names of the form key=value into columns.
    table = pyarrow.parquet.ParquetFile(path).read()
    # As a Dataset, which keeps the label names of a file that `datasets` wrote.
    rows: Table = datasets.Dataset(table.slice(0, most))
    return rows


def _json(path: Path, most: int | None) -> Rows:
    # newline: only \n ends a line. JSON strings may contain other line breaks, such as U+2028.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return Rows(_columns(islice(_objects(file), most)))


def _objects(file: TextIO) -> Iterator[dict[str, Any]]:
    """One object per line, or one list of objects or of texts in the whole file."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        is_list = line.lstrip().startswith("[")
        value = _parsed(line + file.read() if is_list else line.rstrip(), number)
        for place, row in enumerate(value if is_list else [value], start=1):
            row = {"text": row} if is_list and isinstance(row, str) else row
            if not isinstance(row, dict):
                where = f"item {place}" if is_list else f"line {number}"
                raise ValueError(f'{where} is {json.dumps(row):.40}, expected an object such as {{"text": "…"}}')
            yield row
        if is_list:
            return


def _parsed(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: {error.msg}; expected one JSON object per line, or one list of them") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; brackets nested a thousand deep
        raise ValueError(f"line {line}: {error}") from error


def _columns(rows: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns for all names, with None in rows that lack one.

    >>> _columns([{"a": 1}, {"b": 2}])
    {'a': [1, None], 'b': [None, 2]}
    """
    columns: dict[str, list[Any]] = {}
    for count, row in enumerate(rows):
        for name in row:
            if name not in columns:
                columns[name] = [None] * count
        for name, column in columns.items():
            column.append(row.get(name))
    return columns


def _csv(path: Path, most: int | None) -> Rows:
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _csv_rows(file, most)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(file: TextIO, most: int | None) -> Rows:
    reader = csv.reader(file, strict=True)
    try:
        # The names that pandas gives to columns without one, such as its index.
        names = [name or f"Unnamed: {i}" for i, name in enumerate(next(reader, []))]
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise ValueError(f"two columns are called {twice[0]}")
        cells: list[list[str | None]] = [[] for _ in names]
        for record in islice(filter(None, reader), most):
            if len(record) > len(names):
                raise ValueError(f"line {reader.line_num} has {len(record)} fields, and the header {len(names)}")
            for column, cell in zip(cells, record + [""] * (len(names) - len(record)), strict=True):
                column.append(cell or None)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    return Rows({name: _as_written(column) for name, column in zip(names, cells, strict=True)})


def _as_written(cells: Sequence[str | None]) -> list[Any]:
    """A CSV column as numbers or truth values if Python writes each of its cells in the same way, else as texts.

    >>> _as_written(["7", None, "12"]), _as_written(["1", "0.5"]), _as_written(["True", "False"])
    ([7, None, 12], [1.0, 0.5], [True, False])
    >>> _as_written(["007", "12"]), _as_written(["0.50"]), _as_written(["nan"]), _as_written(["7", "seven"])
    (['007', '12'], ['0.50'], ['nan'], ['7', 'seven'])
    """
    for kind in (_whole, _decimal, _truth):
        try:
            return [None if cell is None else kind(cell) for cell in cells]
        except ValueError:
            continue
    return list(cells)


def _whole(cell: str) -> int:
    return _same(int(cell), cell)


def _decimal(cell: str) -> float:
    number = float(cell)
    if number.is_integer() and cell == str(int(number)):  # a whole number among others that are not
        return number
    if not math.isfinite(number):
        raise ValueError(cell)
    return _same(number, cell)


def _truth(cell: str) -> bool:
    return _same(cell == "True", cell)


def _same(value: T, cell: str) -> T:
    if str(value) != cell:
        raise ValueError(cell)
    return value


READERS: dict[str, Callable[[Path, int | None], Table]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
