"""Metrics are declared once, written so that they can be read back, and shown unchanged."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_accel.runs import metrics
from rlhf_accel.runs.metrics import METRICS, NAMES, JsonLines, Progressline, Stopwatch, markdown_table, read_rows

# The keys that design.md promises to readers of metrics.jsonl.
PROMISED = """
step episodes objective/score objective/score_std objective/reward objective/kl objective/kl_k3
objective/entropy kl/coef loss/policy loss/value loss/total policy/approx_kl policy/clip_fraction policy/ratio_max
policy/first_ratio_error value/clip_fraction value/explained_variance rollout/response_tokens rollout/eos_fraction
optim/lr optim/grad_norm optim/skipped_steps time/rollout time/score time/update time/step perf/samples_per_second
perf/response_tokens_per_second perf/peak_memory_mib eval/score eval/kl
"""


class Clock:
    """A fake `time` that stands still between ticks."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def figures(step: int) -> dict[str, float]:
    return {"step": step, "objective/score": 0.5, "objective/kl": 1.25, "objective/entropy": 2.0, "time/step": 3.0}


def test_every_metric_is_declared_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) == len(NAMES)
    assert set(PROMISED.split()) <= NAMES
    for metric in METRICS:
        assert metric.meaning and metric.reduction, metric.name
        levels = 2 if metric.name.endswith("/NAME") else 1  # of a family of metrics
        assert metric.name in ("step", "episodes") or metric.name.count("/") == levels, metric.name


def test_the_table_has_a_row_for_every_metric() -> None:
    head, rule, *rows = markdown_table().splitlines()
    assert head.count("|") == rule.count("|") == 5
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in METRICS]
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5, f"a bar inside a cell is not escaped: {row}"


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


def test_stopwatch_adds_up_a_phase(clock: Clock) -> None:
    watch = Stopwatch(started=clock.now)
    with watch("rollout"):
        clock.now += 2
    clock.now += 5
    with watch("update"):
        clock.now += 1
    with pytest.raises(KeyError), watch("rollout"):
        clock.now += 3
        raise KeyError
    assert watch.seconds == {"rollout": 5.0, "update": 1.0}
    assert watch.total() == 11.0


def test_off_a_terminal_every_step_is_a_plain_line_with_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progressline(200, enabled=True) as line:
        for step in (1, 2):
            clock.now += 3
            line.show(figures(step))
    assert capsys.readouterr().out.splitlines() == [
        "step 1/200  score +0.500  kl 1.25  entropy 2.00  3.0 s/step  left 9:57",
        "step 2/200  score +0.500  kl 1.25  entropy 2.00  3.0 s/step  left 9:54",
    ]


def test_time_left_counts_from_where_a_resumed_run_began(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progressline(100, enabled=True) as line:
        clock.now += 1.999
        line.show(figures(71))
    # 29 steps of 1.999 s are 57.97 s; 59.97 s would be a minute, not 0:60.
    assert capsys.readouterr().out.strip().endswith("left 0:58")


def test_seconds_left_are_never_sixty(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progressline(2, enabled=True) as line:
        clock.now += 59.7
        line.show(figures(1))
    assert capsys.readouterr().out.strip().endswith("left 1:00")


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progressline(2, enabled=False) as line:
        line.show(figures(1))
        line.say("hello")
        line.table("samples", [{"prompt": "a"}])
    assert capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Progressline(2, enabled=True)
    line.console = Console(force_terminal=True, width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with line:
        line.show(figures(1))
        line.show(figures(2))
        assert line._bar is not None and line._bar.tasks[0].completed == 2
    assert "score +0.500" in line._bar.tasks[0].description
    line.console.file.close()


def test_a_table_shows_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "[b]x[/b] [red]", "response": "a \\[i] :smile: [/]\nb\x1b[31m", "score": 0.5}
    Progressline(1, enabled=True).table("samples of step 1", [row, {**row, "score": -12.345}])
    out = capsys.readouterr().out
    assert "samples of step 1" in out
    assert "[b]x[/b] [red]" in out
    assert "a \\[i] :smile: [/]⏎b\N{REPLACEMENT CHARACTER}[31m" in out
    assert "+0.50" in out and "-12.35" in out
    assert "\x1b" not in out


def test_messages_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Progressline(1, enabled=True).say("[red]/tmp/:smile:[/red]")
    assert capsys.readouterr().out == "[red]/tmp/:smile:[/red]\n"


def test_rows_are_read_back_and_torn_lines_are_numbered(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == ([], [])
    JsonLines(path).write({"step": 1, "text": "line\u2028break", "kl": math.nan})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2}{"st\n12\nnull\n\n{"step": 3}\n{"step": 4, "ob')
    assert read_rows(path) == ([{"step": 1, "text": "line\u2028break", "kl": None}, {"step": 3}], [2, 3, 4, 7])
