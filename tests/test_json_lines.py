"""Rows are written so that they can be read back, and cut back to a step."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest

from rlhf_accel.runs.json_lines import JsonLines, read_rows


def test_a_row_is_one_line_of_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": "ö\n", "f": None})
    JsonLines(path).write({"step": 2})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.5, "e": "ö\n", "f": None}, {"step": 2}]


def test_rewind_drops_later_rows(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "samples.jsonl")
    texts = {1: "a", 2: "line\u2028break\x85", 3: "b", 4: "c"}
    for step, text in texts.items():
        lines.write({"step": step, "text": text})
    lines.rewind(2)
    rows = [json.loads(line) for line in lines.path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert rows == [{"step": 1, "text": "a"}, {"step": 2, "text": texts[2]}]
    lines.write({"step": 3})
    assert lines.path.read_text(encoding="utf-8").endswith('{"step": 3}\n')
    assert list(tmp_path.iterdir()) == [lines.path]


def test_rewind_survives_a_row_that_a_crash_cut_short(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "\xc3')
    lines.rewind(2)
    assert lines.path.read_text(encoding="utf-8") == '{"step": 1}\n'


def test_a_row_that_the_disk_takes_half_of_is_kept_for_later(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the kernel writes what fits, then refuses."""
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1})
    whole = lines.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, hard))
    try:
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                lines.write({"step": step})
            assert lines.path.read_bytes() == whole
        with pytest.raises(OSError, match="File too large"):
            lines.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.flush()
    assert lines.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    lines.flush()
    assert len(lines.path.read_text().splitlines()) == 3


def test_rewind_of_nothing(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").rewind(3)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_read_back_and_torn_lines_are_numbered(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == ([], [])
    JsonLines(path).write({"step": 1, "text": "line\u2028break", "kl": math.nan})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2}{"st\n12\nnull\n\n{"step": 3}\n{"step": 4, "ob')
    assert read_rows(path) == ([{"step": 1, "text": "line\u2028break", "kl": None}, {"step": 3}], [2, 3, 4, 7])
