"""The progress of a run on the console, with its messages and tables of texts. Knows the console; knows no file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlhf_accel.system.console import Stream, standard_output
from rlhf_accel.system.terminal import Terminal


class ProgressLine:
    """The progress of a run on the console: a bar on a terminal, elsewhere one line per step."""

    def __init__(self, total: int, *, enabled: bool, unit: str = "step") -> None:
        self.enabled = enabled
        self._unit = unit
        # A stream that may fail: a run continues without its console.
        self.console = Terminal(soft_wrap=True, quiet=not enabled, emoji=False, file=cast(Any, Stream(standard_output)))
        self._total = total
        self._started = time.perf_counter()
        self._first: int | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressLine:
        if self.enabled and self.console.is_terminal:
            columns = (self._unit, BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, "left", TimeRemainingColumn(), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        text = (
            f"score {metrics['objective/score']:+.3f}  kl {metrics['objective/kl']:.2f}  "
            f"entropy {metrics['objective/entropy']:.2f}  {metrics['time/step']:.1f} s/step"
        )
        self.advance(int(metrics["step"]), text)

    def advance(self, done: int, text: str) -> None:
        """Show that `done` steps of the total are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=text)
            return
        self._first = done - 1 if self._first is None else self._first
        left = (time.perf_counter() - self._started) / (done - self._first) * (self._total - done)
        minutes, seconds = divmod(round(left), 60)
        self.console.print(f"{self._unit} {done}/{self._total}  {text}  left {minutes}:{seconds:02}", highlight=False)

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        self.console.print(text, highlight=False, markup=False)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print rows with the same keys as a table."""
        table = Table(title=title, title_justify="left", show_lines=True)
        for key in rows[0]:
            table.add_column(str(key), justify="right" if isinstance(rows[0][key], float) else "left", overflow="fold")
        for row in rows:
            table.add_row(*(f"{v:+.2f}" if isinstance(v, float) else plain(str(v)) for v in row.values()))
        self.console.print(table)


def plain(text: str) -> Text:
    """A policy's text for a cell of a table, without markup, line breaks and control codes."""
    return Text("".join(c if c.isprintable() else "⏎" if c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
