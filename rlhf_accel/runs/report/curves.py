"""The charts of a report, as data to draw: which metrics of a run get a chart, and how they are grouped.

Knows metrics and, through charts.py, matplotlib. Knows no page and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_accel.runs.metrics import METRICS, Metric
from rlhf_accel.runs.report import charts
from rlhf_accel.runs.report.run_data import Run, in_order, interval_of, is_interval, known_or, skipped_steps

_MOST_OTHERS = 40  # charts of gold rewards and other evaluations
_METRICS = {metric.name: metric for metric in METRICS}
_UNKNOWN = Metric("", "", "", "")

# Charts: title, whether the axis starts at 0, and metrics, each with the label of its line.
PANELS: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Score", False, (("objective/score", "training"), ("eval/score", "held-out, 95 %"))),
    ("KL to the reference", False, (("objective/kl", "training"), ("eval/kl", "held-out, 95 %"))),
    ("Entropy", False, (("objective/entropy", ""),)),
    ("Response length", True, (("rollout/response_tokens", "training"), ("eval/length", "held-out"))),
    ("Responses ended by a stop", True, (("rollout/eos_fraction", "training"), ("eval/eos_fraction", "held-out"))),
    ("Policy loss", False, (("loss/policy", ""),)),
    ("Value loss", False, (("loss/value", ""),)),
    ("Total loss", False, (("loss/total", ""),)),
    ("Clip fractions", True, (("policy/clip_fraction", "policy"), ("value/clip_fraction", "value"))),
    ("KL of an update", True, (("policy/approx_kl", ""),)),
    ("Explained variance", False, (("value/explained_variance", ""),)),
    ("Gradient norm", True, (("optim/grad_norm", ""),)),
    ("Learning rate", True, (("optim/lr", ""),)),
    ("Weight of the KL", True, (("kl/coef", ""),)),
    ("Peak memory", True, (("perf/peak_memory_mib", ""),)),
    ("Responses per second", True, (("perf/samples_per_second", ""),)),
)
_SHOWN = {name for _, _, lines in PANELS for name, _ in lines}
# Charts in which skipped steps are marked.
UPDATES = ("Policy loss", "Value loss", "Total loss", "Gradient norm", "Score")
_PHASES = [name for name in _METRICS if name.startswith("time/") and name != "time/step"]


def panels(runs: Sequence[Run]) -> list[charts.Chart]:
    """The charts over steps for which at least one run has values."""
    known = {name for run in runs for row in run.rows for name, value in row.items() if value is not None}
    others = [name for name in sorted(known) if _is_other_evaluation(name)][:_MOST_OTHERS]
    rewards = sorted({name.partition("/score/")[2] for name in known if "/score/" in name})[:_MOST_OTHERS]
    plans = [
        *PANELS,
        *((f"Score: {name}", False, _by_reward(name)) for name in rewards),
        *((title_of(name), False, ((name, "held-out, 95 %"),)) for name in others),
    ]
    drawn = []
    for title, from_zero, lines in plans:
        there = [(name, label) for name, label in lines if name in known]
        if there:
            drawn.append(_panel(runs, title, from_zero, there))
    return [*drawn, *(_phases(run, alone=len(runs) == 1) for run in runs if any(p in known for p in _PHASES))]


def _by_reward(name: str) -> tuple[tuple[str, str], ...]:
    return (f"objective/score/{name}", "training"), (f"eval/score/{name}", "held-out, 95 %")


def _is_other_evaluation(name: str) -> bool:
    return name.startswith("eval/") and name not in _SHOWN and "/score/" not in name and not is_interval(name)


def title_of(name: str) -> str:
    """A chart's title from the name of a metric.

    >>> title_of("eval/win_rate"), title_of("eval/gold/vader")
    ('Win rate', 'Gold reward: vader')
    """
    name = name.removeprefix("eval/")
    if name.startswith("gold/"):
        return f"Gold reward: {name.removeprefix('gold/')}"
    return name.replace("_", " ").capitalize()


def _metric(name: str) -> Metric:
    return _METRICS.get(name) or _METRICS.get(f"{name.rpartition('/')[0]}/NAME", _UNKNOWN)


def _panel(runs: Sequence[Run], title: str, from_zero: bool, quantities: Sequence[tuple[str, str]]) -> charts.Chart:
    lines, several = [], len(runs) > 1
    for number, run in enumerate(runs):
        trained = 0
        for name, label in quantities:
            values, points = run.column(name), name.startswith("eval/")
            if all(math.isnan(value) for value in values):
                continue
            half = run.column(interval_of(name)) if points else None
            line_label = f"{_short(run.name)}{f', {label}' if label and trained else ''}" if several else label
            # One run: a colour for each line; several runs: a colour for each run.
            colour = number if several else (1 if points else 0)
            lines.append(
                charts.Line(
                    x=run.steps(),
                    y=values,
                    label=line_label if len(quantities) > 1 or several else "",
                    colour=colour,
                    style=trained,
                    half=None if half is None or all(map(math.isnan, half)) else [0.0 if h != h else h for h in half],
                    points=points,
                )
            )
            trained += not points
    if several:
        lines = _without_repeats(lines)
    unit = _metric(quantities[0][0]).unit
    if not unit and "fraction" in quantities[0][0]:
        unit = "share"
    marks = sorted({step for run in runs for step in skipped_steps(run)}) if title in UPDATES else []
    return charts.Chart(
        name=_stem(quantities[0][0]),
        title=title,
        y=unit,
        caption=_caption(quantities, several),
        lines=tuple(lines),
        marks=tuple(marks),
        from_zero=from_zero,
    )


def _without_repeats(lines: Sequence[charts.Line]) -> list[charts.Line]:
    """Label the first line of each run only; the caption explains dashes and dots."""
    seen: set[int] = set()
    kept = []
    for line in lines:
        kept.append(replace(line, label="" if line.colour in seen else line.label))
        seen.add(line.colour)
    return kept


def _caption(quantities: Sequence[tuple[str, str]], several: bool) -> str:
    """The meaning of each line; with several runs, also its style."""
    if len(quantities) == 1:
        return _meaning(quantities[0][0])
    parts, dashes = [], iter((" (solid)", " (dashed)"))
    for name, label in quantities:
        drawn = " (dots)" if name.startswith("eval/") else next(dashes)
        parts.append(f"{label}{drawn if several else ''}: {_meaning(name)}")
    return "; ".join(parts)


def _meaning(name: str) -> str:
    metric = _metric(name)
    return ", ".join(part for part in (metric.meaning, metric.reduction) if part) or name


def _phases(run: Run, *, alone: bool) -> charts.Chart:
    """Seconds of a step by phase; the rest is shown as `other`."""
    phases = {name: run.column(name) for name in _PHASES}
    totals = run.column("time/step")
    rest = [max(0.0, total - sum(parts)) for total, *parts in zip(totals, *phases.values(), strict=True)]
    columns = [*((name.removeprefix("time/"), values) for name, values in phases.items()), ("other", rest)]
    return charts.Chart(
        name="time" if alone else f"time-{_stem(run.name)}",
        title="Time of a step" if alone else f"Time of a step: {_short(run.name)}",
        y="s",
        caption="; ".join(f"{name.removeprefix('time/')}: {_METRICS[name].meaning}" for name in _PHASES),
        lines=tuple(
            charts.Line(x=run.steps(), y=values, label=label, colour=number)
            for number, (label, values) in enumerate(columns)
        ),
        stacked=True,
    )


def frontier_charts(runs: Sequence[Run]) -> list[charts.FrontierChart]:
    """One chart, or none: the curves of the first run with a frontier, and the evaluations of all runs."""
    first = next((run for run in runs if run.frontier is not None), None)
    if first is None or first.frontier is None:
        return []
    found = first.frontier
    paths = []
    for number, run in enumerate(runs):
        for way, points in enumerate(_ways(run.points)):
            paths.append(
                charts.Course(
                    label="" if way else _short(run.name) if len(runs) > 1 else "this run",
                    colour=0 if len(runs) == 1 else number,
                    curve=_curve(points),
                    kl_low=[known_or(point.get("kl_low"), point["kl"]) for point in points],
                    kl_high=[known_or(point.get("kl_high"), point["kl"]) for point in points],
                    names=[str(point.get("name", "")) for point in points],
                    dashed=way > 0,
                )
            )
    samples = f"{found.samples} samples of the reference for each of {found.prompts} prompts"
    shared = f"; the curves are those of {first.name}" if len(runs) > 1 else ""
    unknown = "" if found.no_share is None else f"; beyond it the optimum is unknown: {found.no_share}"
    return [
        charts.FrontierChart(
            name="frontier",
            title="What the KL bought",
            caption=f"gain in score over the reference against KL, beside best-of-n and the highest gain of any "
            f"policy at that KL; from {samples}; bars and bands are 95 % intervals{shared}{unknown}",
            best_of_n=_curve([vars(point) for point in found.best_of_n]),
            sizes=[point.n for point in found.best_of_n],
            optimum=_curve([vars(point) for point in found.optimum]),
            bound=_curve([vars(point) for point in found.bound] if found.no_share is None else []),
            reliable_kl=found.reliable_kl,
            paths=tuple(paths),
        )
    ]


def _curve(points: Sequence[Mapping[str, Any]]) -> charts.Curve:
    return charts.Curve(
        kl=[point["kl"] for point in points],
        gain=[point["gain"] for point in points],
        low=[known_or(point.get("low"), point["gain"]) for point in points],
        high=[known_or(point.get("high"), point["gain"]) for point in points],
    )


def _ways(points: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The path of the run; then, for each model whose adapter was scaled, the path from it back to the base."""
    scaled: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        model, at, _ = str(point.get("name")).partition("@")
        if at:
            scaled.setdefault(model, [p for p in points if p.get("name") == model]).append(point)
    path = in_order(points)
    back = [sorted(way, key=lambda point: -point["kl"]) for way in scaled.values()]
    return [path, *back] if path or back else []


def _short(name: str) -> str:
    """A run's name for small spaces."""
    return name if len(name) <= 20 else f"…{name[-19:]}"


def _stem(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
