"""A run read from its folder, for the report. Knows files and their faults; knows no chart and no page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_accel.algorithm.frontier import Frontier
from rlhf_accel.config.keys import flatten
from rlhf_accel.config.loading import parse_yaml
from rlhf_accel.runs import records
from rlhf_accel.runs.json_lines import read_last_rows, read_rows
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import parse_json, read_bounded, whole

_MOST_POINTS = 1000  # beside a frontier
_OF_A_REWARD = re.compile("((?:eval/)?(?:score|gold))/(.+)")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run's folder. `notes` are messages about what could not be read."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any] | None
    """Dotted keys."""
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    environment: dict[str, Any] | None
    frontier: Frontier | None
    points: list[dict[str, Any]]
    """The run's evaluations beside the frontier."""
    notes: tuple[str, ...]

    def column(self, name: str) -> list[float]:
        """A metric for each row; nan where it is unknown."""
        return [as_number(row.get(name)) for row in self.rows]

    def steps(self) -> list[float]:
        return self.column("step")


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run's files. Raises `ConfigError` if there is no metrics.jsonl, or no whole row in it yet."""
    notes: list[str] = []
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run's folder, or its first step has not ended: it holds no metrics.jsonl")
    rows = [row for row in _rows(path, notes) if isinstance(row.get("step"), int) and abs(row["step"]) < 1e15]
    if not rows:
        raise ConfigError(f"{path} holds no whole row yet; the first is written after step 1")
    summary = _tree(folder / "summary.json", notes, _of(records.Summary))
    if summary is not None and summary.get("steps") != rows[-1]["step"]:
        notes.append(f"summary.json is of step {summary.get('steps')}, before the run was resumed, and left out")
        summary = None
    config = _tree(folder / "config.yaml", notes, _yaml)  # one of another version may hold unknown keys
    curves = _tree(folder / "frontier.json", notes)
    frontier = None
    if curves is not None:
        try:
            frontier = records.check(vars(Frontier.from_json(curves)), Frontier)
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"frontier.json is not as `evaluate --frontier` writes it ({type(error).__name__}: {error})")
    points = [] if frontier is None or curves is None else _point_rows(curves)
    return Run(
        name=name or run_names([folder])[0],
        folder=folder,
        rows=rows,
        samples=_samples(folder / "samples.jsonl", notes),
        config=None if config is None else flatten(config),
        summary=summary,
        evaluation=_tree(folder / "evaluation.json", notes, _of(records.Evaluations)),
        environment=_tree(folder / "environment.json", notes),
        frontier=frontier,
        points=points,
        notes=tuple(notes),
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths if two names are the same."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    rows, torn = read_rows(path)
    notes.extend(f"line {number} of {path.name} is torn and left out" for number in torn)
    return rows


def _samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    rows, torn, left_out = read_last_rows(path)
    if left_out:
        notes.append(f"{path.name} is too large to be read whole; its first rows are left out")
    after = ", counted from the first line that was read," if left_out else ""
    notes.extend(f"line {number} of {path.name}{after} is torn and left out" for number in torn)
    return rows


def _of(kind: Any) -> Callable[[bytes], Any]:
    return lambda content: records.check(parse_json(content), kind)


def _yaml(content: bytes) -> Any:
    return parse_yaml(whole(content, 256 << 10).decode("utf-8"))


def _point_rows(curves: Mapping[str, Any]) -> list[dict[str, Any]]:
    points = curves.get("points")
    return [point for point in points if _is_point(point)][:_MOST_POINTS] if isinstance(points, list) else []


def _tree(path: Path, notes: list[str], parse: Callable[[bytes], Any] = parse_json) -> dict[str, Any] | None:
    """The content of a file, None if there is none; a file that cannot be read, or holds no tree, adds a note."""
    if not path.is_file():
        return None
    try:
        tree = parse(read_bounded(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())}) and is left out")
        return None
    if isinstance(tree, dict):
        return tree
    notes.append(f"{path.name} is empty or not as a run writes it, and left out")
    return None


def _is_point(point: Any) -> bool:
    return isinstance(point, dict) and math.isfinite(as_number(point.get("kl")) + as_number(point.get("gain")))


def as_number(value: Any) -> float:
    """The value as a number; nan if it is not a number, or too large for a chart."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e30 else math.nan


def interval_of(name: str) -> str:
    """The name of the half-width of a metric's interval, in metrics.jsonl or in a summary.

    >>> interval_of("eval/score"), interval_of("eval/score/length"), interval_of("gold/vader")
    ('eval/score_ci', 'eval/score_ci/length', 'gold_ci/vader')
    """
    own = _OF_A_REWARD.fullmatch(name)
    return f"{own[1]}_ci/{own[2]}" if own else f"{name}_ci"


def is_interval(name: str) -> bool:
    """Whether a metric is such a half-width; a reward may have any name.

    >>> [is_interval(name) for name in ("eval/score_ci", "gold_ci/vader", "eval/gold/social_circle", "gold/my_ci")]
    [True, True, False, False]
    """
    if name.removeprefix("eval/").startswith(("score_ci/", "gold_ci/")):
        return True
    return name.endswith("_ci") and not _OF_A_REWARD.fullmatch(name)


def skipped_steps(run: Run) -> list[float]:
    """Steps with a skipped update: those where the cumulative count grows."""
    counts = run.column("optim/skipped_steps")
    return [step for step, before, now in zip(run.steps(), [0.0, *counts], counts, strict=False) if now > before]


def known_or(value: Any, other: float) -> float:
    """The value as a number, or `other` if it is unknown."""
    number = as_number(value)
    return other if math.isnan(number) else number


def in_order(points: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Evaluations in order of steps, the path of the run. Of one step the last is kept, which was measured best.

    Models whose adapter was scaled are left out.
    """
    by_step: dict[Any, Mapping[str, Any]] = {}
    for point in points:
        step, name = point.get("step"), str(point.get("name"))
        if "@" not in name:
            by_step[step if isinstance(step, int) else name] = point
    return sorted(by_step.values(), key=lambda point: known_or(point.get("step"), math.inf))
