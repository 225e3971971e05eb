"""Metrics of a run: name, unit, meaning and reduction of each, and the files and the console that they go to.

Values are reduced over ranks before they come here. Only the main process opens files. Knows no model.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlhf_accel.system.console import Stream, standard_output
from rlhf_accel.system.errors import ConfigError, why
from rlhf_accel.system.files import Malformed, parse_json, read_bounded, read_tail, replace_text
from rlhf_accel.system.terminal import Terminal

# Limits of metrics.jsonl and samples.jsonl, which no run exceeds.
_MOST_BYTES, _MOST_ROWS, _LONGEST_ROW = 256 << 20, 500_000, 4 << 20


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    meaning: str
    reduction: str


METRICS = (
    Metric("step", "", "PPO step, from 1", "same on all ranks"),
    Metric("episodes", "responses", "responses sampled since the start", "sum over steps"),
    Metric("objective/score", "score", "score of a response (calibrated, if so configured)", "mean over responses"),
    Metric("objective/score_std", "score", "spread of those scores", "standard deviation over responses"),
    Metric(
        "objective/reward", "score", "sum of a response's token rewards: score less KL penalty", "mean over responses"
    ),
    Metric("objective/kl", "nats/response", "KL of the policy to the reference, k1", "mean over responses"),
    Metric(
        "objective/kl_k3",
        "nats/response",
        "the same, k3: never negative; less noisy near the reference, more noisy far from it",
        "mean over responses",
    ),
    Metric("objective/entropy", "nats/token", "entropy of the policy at sampled tokens", "mean over tokens"),
    Metric("kl/coef", "score/nat", "weight of the KL in the reward, or the loss, of this step", "same on all ranks"),
    Metric("loss/policy", "", "policy loss", "mean over tokens and updates"),
    Metric("loss/value", "", "clipped value loss", "mean over tokens and updates"),
    Metric("loss/kl", "nats/token", "KL to the reference, where ppo.kl_in=loss", "mean over tokens and updates"),
    Metric(
        "loss/total",
        "",
        "loss/policy + vf_coef x loss/value - entropy_coef x entropy + kl/coef x loss/kl",
        "mean over tokens and updates",
    ),
    Metric(
        "policy/approx_kl",
        "nats/token",
        "KL between the policy before and after the update, k3",
        "mean over tokens and updates",
    ),
    Metric("policy/clip_fraction", "", "tokens whose ratio was clipped", "mean over tokens and updates"),
    Metric("policy/ratio_max", "", "largest ratio of new to old probability", "max over tokens and updates"),
    Metric("policy/first_ratio_error", "", "|ratio - 1| before the first update: rounding only", "max over tokens"),
    Metric("value/clip_fraction", "", "tokens whose value was clipped", "mean over tokens and updates"),
    Metric(
        "value/explained_variance",
        "",
        "share of the returns' variance that values predicted, partial scores included",
        "over tokens",
    ),
    Metric("rollout/response_tokens", "tokens", "length of a response", "mean over responses"),
    Metric("rollout/eos_fraction", "", "responses that end with a stop token or text", "mean over responses"),
    Metric(
        "rollout/flat_groups",
        "",
        "prompts whose responses all score alike, where rollout.samples_per_prompt is above 1",
        "mean over prompts",
    ),
    Metric("optim/lr", "", "learning rate of the policy in this step", "same on all ranks"),
    Metric("optim/grad_norm", "", "norm of the gradient before clipping", "mean over updates"),
    Metric(
        "optim/skipped_steps",
        "",
        "optimizer steps, or whole steps, skipped because a number was not finite",
        "sum over steps",
    ),
    Metric("time/rollout", "s", "sampling, log-probabilities, values, reference", "main process"),
    Metric("time/score", "s", "rewards", "main process"),
    Metric("time/update", "s", "forward and backward passes and optimizer steps", "main process"),
    Metric("time/step", "s", "the whole step", "main process"),
    Metric("perf/samples_per_second", "responses/s", "responses of all ranks divided by time/step", "sum over ranks"),
    Metric(
        "perf/response_tokens_per_second",
        "tokens/s",
        "response tokens of all ranks divided by time/step",
        "sum over ranks",
    ),
    Metric("perf/peak_memory_mib", "MiB", "peak memory of a process so far: GPU if there is one", "max over ranks"),
    Metric("eval/score", "score", "score on held-out prompts; only at steps with an evaluation", "mean over responses"),
    Metric("eval/score_ci", "score", "half-width of its 95 % interval: 1.96 s / sqrt(prompts)", "over prompts"),
    Metric("eval/kl", "nats/response", "KL to the reference on held-out prompts, k1", "mean over responses"),
    Metric("eval/kl_ci", "nats/response", "half-width of its 95 % interval", "over prompts"),
    Metric("eval/length", "tokens", "length of a response to held-out prompts", "mean over responses"),
    Metric(
        "eval/eos_fraction",
        "",
        "responses to held-out prompts that end with a stop token or text",
        "mean over responses",
    ),
    Metric("eval/distinct_1", "", "distinct tokens divided by tokens", "over the tokens of all responses"),
    Metric("eval/distinct_2", "", "the same for pairs of tokens", "over the pairs of all responses"),
    Metric(
        "eval/self_repetition", "", "share of a response's 4-grams that occurred before in it", "mean over responses"
    ),
    Metric(
        "eval/reference_perplexity",
        "",
        "perplexity of the responses under the reference, at rollout.temperature",
        "over the tokens of all responses",
    ),
    Metric(
        "eval/win_rate",
        "",
        "responses with a score above the base's for the same prompt and random numbers; ties count half",
        "mean over responses",
    ),
    Metric("eval/win_rate_ci", "", "half-width of its 95 % interval", "over prompts"),
    Metric(
        "eval/gold/NAME",
        "gold score",
        "score by reward.gold's NAME on held-out prompts; null if it failed",
        "mean over responses",
    ),
    Metric("eval/gold_ci/NAME", "gold score", "half-width of its 95 % interval", "over prompts"),
)
NAMES = frozenset(metric.name for metric in METRICS)


def markdown_table() -> str:
    """The metrics as docs/reference.md lists them."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(m)) + " |" for m in METRICS]
    return "\n".join(["| key | unit | meaning | reduction |", "| --- | --- | --- | --- |", *rows])


def _cells(metric: Metric) -> tuple[str, ...]:
    return f"`{metric.name}`", metric.unit, metric.meaning, metric.reduction


@dataclass
class Stopwatch:
    """Seconds by phase; a phase may be entered several times."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    entering: Callable[[str], None] = lambda _: None
    """Called with the name of a phase when it starts, but not where the phase before has the same name."""
    _phase: str = ""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase != self._phase:
            self._phase = phase
            self.entering(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self.started


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


class Progressline:
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

    def __enter__(self) -> Progressline:
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


class Journal:
    """Metrics and samples of a run, written to its folder and to the console by the main process."""

    def __init__(self, folder: Path, line: Progressline) -> None:
        self.folder = folder
        self.line = line
        self._files = {name: JsonLines(folder / f"{name}.jsonl") for name in ("metrics", "samples")}

    def record(self, metrics: Mapping[str, float]) -> None:
        self.line.show(metrics)
        self._write("metrics", metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._write("samples", {"step": step, **row})
        self.line.table(f"samples of step {step}", rows)

    def flush(self) -> None:
        """Write all rows to disk. Raises `OSError` if that fails."""
        for file in self._files.values():
            file.flush()

    def rewind(self, step: int, *, recorded: bool = True) -> None:
        """Drop the rows after `step`, which a resumed run writes again; unless `recorded`, also its metrics."""
        self._files["metrics"].rewind(step if recorded else step - 1)
        self._files["samples"].rewind(step)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        """Write a row. One that the disk does not take is kept; it goes to disk before the next checkpoint."""
        try:
            self._files[name].write(row)
        except OSError as error:
            self.line.say(f"warning: {self._files[name].path} could not be written ({error.strerror}); rows are kept")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the results of a finished run."""
        if summary.get("samples"):
            self.line.table("held-out prompts, before and after", summary["samples"])
        if "gain" in summary:
            base, trained = summary["base"], summary["trained"]
            self.line.say(
                f"held-out score {base['score']:+.3f} (std {base['score_std']:.3f}) before, {trained['score']:+.3f} "
                f"after: a gain of {summary['gain']:.2f} standard deviations at a KL of {trained['kl']:.2f} nats"
            )
        for key in summary.get("trained", ()):
            if key.startswith("gold/") and key in summary["base"]:
                before, after = summary["base"][key], summary["trained"][key]
                self.line.say(f"{key.removeprefix('gold/')}, not trained on: {before:+.3f} before, {after:+.3f} after")
        self.line.say(f"{summary['steps']} steps in {summary['seconds']:.0f} s; the model: {self.folder / 'final'}")


def plain(text: str) -> Text:
    """A policy's text for a cell of a table, without markup, line breaks and control codes."""
    return Text("".join(c if c.isprintable() else "⏎" if c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
