"""The console shows progress, messages and tables unchanged; the stopwatch behind it adds up phases."""

from __future__ import annotations

import pytest
from rich.console import Console

from rlhf_accel.runs import progress_line
from rlhf_accel.runs.progress_line import ProgressLine
from rlhf_accel.system import stopwatch
from rlhf_accel.system.stopwatch import Stopwatch


class Clock:
    """A fake `time` that stands still between ticks."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (stopwatch, progress_line):
        monkeypatch.setattr(module, "time", clock)
    return clock


def figures(step: int) -> dict[str, float]:
    return {"step": step, "objective/score": 0.5, "objective/kl": 1.25, "objective/entropy": 2.0, "time/step": 3.0}


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
    with ProgressLine(200, enabled=True) as line:
        for step in (1, 2):
            clock.now += 3
            line.show(figures(step))
    assert capsys.readouterr().out.splitlines() == [
        "step 1/200  score +0.500  kl 1.25  entropy 2.00  3.0 s/step  left 9:57",
        "step 2/200  score +0.500  kl 1.25  entropy 2.00  3.0 s/step  left 9:54",
    ]


def test_time_left_counts_from_where_a_resumed_run_began(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(100, enabled=True) as line:
        clock.now += 1.999
        line.show(figures(71))
    # 29 steps of 1.999 s are 57.97 s; 59.97 s would be a minute, not 0:60.
    assert capsys.readouterr().out.strip().endswith("left 0:58")


def test_seconds_left_are_never_sixty(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(2, enabled=True) as line:
        clock.now += 59.7
        line.show(figures(1))
    assert capsys.readouterr().out.strip().endswith("left 1:00")


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(2, enabled=False) as line:
        line.show(figures(1))
        line.say("hello")
        line.table("samples", [{"prompt": "a"}])
    assert capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ProgressLine(2, enabled=True)
    line.console = Console(force_terminal=True, width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with line:
        line.show(figures(1))
        line.show(figures(2))
        assert line._bar is not None and line._bar.tasks[0].completed == 2
    assert "score +0.500" in line._bar.tasks[0].description
    line.console.file.close()


def test_a_table_shows_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "[b]x[/b] [red]", "response": "a \\[i] :smile: [/]\nb\x1b[31m", "score": 0.5}
    ProgressLine(1, enabled=True).table("samples of step 1", [row, {**row, "score": -12.345}])
    out = capsys.readouterr().out
    assert "samples of step 1" in out
    assert "[b]x[/b] [red]" in out
    assert "a \\[i] :smile: [/]⏎b\N{REPLACEMENT CHARACTER}[31m" in out
    assert "+0.50" in out and "-12.35" in out
    assert "\x1b" not in out


def test_messages_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(1, enabled=True).say("[red]/tmp/:smile:[/red]")
    assert capsys.readouterr().out == "[red]/tmp/:smile:[/red]\n"
