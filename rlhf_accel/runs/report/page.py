"""The report of one run or several: one self-contained page, and its charts as images.

Reads what a run wrote into its folder and knows what is worth a chart; how one is drawn is known by charts.py, how the
page looks by report_page.html. A run that is still going has a report too.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from rlhf_accel.algorithm.frontier import Frontier, share_of_optimum
from rlhf_accel.config.distribution import in_words
from rlhf_accel.config.keys import flatten
from rlhf_accel.config.loading import parse_yaml, to_yaml
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import records
from rlhf_accel.runs.metrics import METRICS, Metric, read_last_rows, read_rows
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import parse_json, read_bounded, replace_text, whole
from rlhf_accel.system.terminal import say as tell
from rlhf_accel.system.version import __version__

if TYPE_CHECKING:
    from rlhf_accel.runs.report import charts

PAGE = "report.html"
MOST_RUNS = 7  # colours that can be told apart
_MOST_POINTS = 1000  # beside a frontier
_MOST_OTHERS = 40  # charts of gold rewards and the like
_MOST_SAMPLES = 600  # rows that a phone still sorts at once
_TEMPLATE = Path(__file__).with_name("page.html")
_METRICS = {metric.name: metric for metric in METRICS}
_UNKNOWN = Metric("", "", "", "")

# A chart: title, whether its axis starts at 0, and what it shows, with the words that tell its lines apart.
_PANELS: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Score", False, (("objective/score", "training"), ("eval/score", "held-out, 95 %"))),
    ("KL to the reference", False, (("objective/kl", "training"), ("eval/kl", "held-out, 95 %"))),
    ("Entropy", False, (("objective/entropy", ""),)),
    ("Response length", True, (("rollout/response_tokens", "training"), ("eval/length", "held-out"))),
    ("Responses ended by a stop", True, (("rollout/eos_fraction", "training"), ("eval/eos_fraction", "held-out"))),
    ("Policy loss", False, (("loss/policy", ""),)),
    ("Value loss", False, (("loss/value", ""),)),
    ("Total loss", False, (("loss/total", ""),)),
    ("Clip fractions", True, (("policy/clip_fraction", "policy"), ("value/clip_fraction", "value"))),
    ("Move of the policy by the update", True, (("policy/approx_kl", ""),)),
    ("Explained variance", False, (("value/explained_variance", ""),)),
    ("Gradient norm", True, (("optim/grad_norm", ""),)),
    ("Learning rate", True, (("optim/lr", ""),)),
    ("Weight of the KL", True, (("kl/coef", ""),)),
    ("Peak memory", True, (("perf/peak_memory_mib", ""),)),
    ("Responses per second", True, (("perf/samples_per_second", ""),)),
)
_SHOWN = {name for _, _, lines in _PANELS for name, _ in lines}
_UPDATES = ("Policy loss", "Value loss", "Total loss", "Gradient norm", "Score")  # where skipped steps are marked
_PHASES = [name for name in _METRICS if name.startswith("time/") and name != "time/step"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run's folder holds: rows of metrics.jsonl and samples.jsonl, files as trees; `notes` tell what
    could not be read."""

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
        """A metric at each row; nan where it is not known."""
        return [_number(row.get(name)) for row in self.rows]

    def steps(self) -> list[float]:
        return self.column("step")


def main(arguments: list[str]) -> None:
    """The command; raises `ConfigError` for a folder that is no run, or where matplotlib is missing."""
    parser = argparse.ArgumentParser(prog="rlhf_accel report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; several are overlaid")
    parser.add_argument("--output", type=Path, help=f"the page (default: {PAGE} in the first run's folder)")
    options = parser.parse_args(arguments)
    page, notes = write(options.runs, options.output)
    for note in notes:
        tell(f"note: {note}")
    tell(f"wrote {page} and {page.with_suffix('')}/*.png")


def after_training(folder: Path, say: Callable[[str], None]) -> None:
    """The report of a run that has ended, said in one line; what cannot be written is said too, and fails nothing."""
    try:
        page, notes = write([folder])
    except Exception as error:  # a run of days must not fail over its picture
        say(f"warning: no report ({' '.join(str(error).split())}); try: python -m rlhf_accel report {folder}")
        return
    say(f"report: {page}" + "".join(f"; {note}" for note in notes))


def write(folders: Sequence[Path], output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page to `output`, and a PNG of each chart into a folder beside it that is named after it.

    Returns the page's path and what could not be read. Raises `ConfigError` for folders that are no runs or that have
    no rows yet, for a place that cannot be written, and where matplotlib is missing.
    """
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs: at most {MOST_RUNS} can be told apart in a chart; name fewer")
    try:
        from rlhf_accel.runs.report import charts
    except ModuleNotFoundError as error:
        raise ConfigError(f"the report is drawn with matplotlib ({error}): pip install 'matplotlib>=3.9'") from error
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    output = output or folders[0] / PAGE
    images = output.with_suffix("")
    if images == output:
        raise ConfigError(
            f"--output {output}: expected the page's name, such as {output}.html; images go to {output}/",
            key="--output",
        )
    try:
        images.mkdir(parents=True, exist_ok=True)
        figures = []
        drawn: list[charts.Chart | charts.FrontierChart] = [*frontier_charts(runs), *panels(runs)]
        for chart in drawn:
            figure = charts.draw(chart)
            charts.png(figure, images / f"{chart.name}.png")
            figures.append({"chart": chart, "svg": charts.svg(figure, chart.name, chart.title)})
        text = page(runs, figures)
        replace_text(output, text)
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written ({error.strerror}); name another place by --output", key="--output"
        ) from error
    return output, [f"{run.name}: {note}" for run in runs for note in run.notes]


# ---------------------------------------------------------------------------------------------------------------------
# What a run wrote
# ---------------------------------------------------------------------------------------------------------------------


def read_run(folder: Path, name: str | None = None) -> Run:
    """A run's files; raises `ConfigError` if there is no metrics.jsonl, or no whole row in it yet."""
    notes: list[str] = []
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run's folder, or its first step has not ended: it holds no metrics.jsonl")
    rows = [row for row in _rows(path, notes) if isinstance(row.get("step"), int) and abs(row["step"]) < 1e15]
    if not rows:
        raise ConfigError(f"{path} holds no whole row yet; the first is written after step 1")
    summary = _tree(folder / "summary.json", notes, _of(records.Summary))
    if summary is not None and summary.get("steps") != rows[-1]["step"]:
        notes.append(f"summary.json is of step {summary.get('steps')}, before the run went on, and left out")
        summary = None
    config = _tree(folder / "config.yaml", notes, _yaml)  # of another version, it may hold keys unknown here
    curves = _tree(folder / "frontier.json", notes)
    frontier = None
    if curves is not None:
        try:
            frontier = records.check(vars(Frontier.from_json(curves)), Frontier)
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"frontier.json is not as `evaluate --frontier` writes it ({type(error).__name__}: {error})")
    points = [] if frontier is None or curves is None else _point_rows(curves)
    return Run(
        name=name or _names([folder])[0],
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


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where names are the same."""
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
    """What the file holds, None where there is none; one that cannot be read, or holds no tree, is noted."""
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
    return isinstance(point, dict) and math.isfinite(_number(point.get("kl")) + _number(point.get("gain")))


def _number(value: Any) -> float:
    """The figure, nan for what is none: also for one that no chart has room for."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e30 else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------------


def panels(runs: Sequence[Run]) -> list[charts.Chart]:
    """The charts over steps for which at least one run has figures."""
    known = {name for run in runs for row in run.rows for name, value in row.items() if value is not None}
    others = [name for name in sorted(known) if _is_other_evaluation(name)][:_MOST_OTHERS]
    plans = [*_PANELS, *((_title(name), False, ((name, "held-out, 95 %"),)) for name in others)]
    drawn = []
    for title, from_zero, lines in plans:
        there = [(name, label) for name, label in lines if name in known]
        if there:
            drawn.append(_panel(runs, title, from_zero, there))
    return [*drawn, *(_phases(run, alone=len(runs) == 1) for run in runs if any(p in known for p in _PHASES))]


def _is_other_evaluation(name: str) -> bool:
    return name.startswith("eval/") and name not in _SHOWN and not _is_interval(name)


def _title(name: str) -> str:
    """A chart's title from the name of a metric.

    >>> _title("eval/win_rate"), _title("eval/gold/vader")
    ('Win rate', 'Gold reward: vader')
    """
    name = name.removeprefix("eval/")
    if name.startswith("gold/"):
        return f"Gold reward: {name.removeprefix('gold/')}"
    return name.replace("_", " ").capitalize()


def _metric(name: str) -> Metric:
    return _METRICS.get(name) or _METRICS.get("eval/gold/NAME" if name.startswith("eval/gold/") else "", _UNKNOWN)


def _interval_of(name: str) -> str:
    """Where the half-width of a figure's interval is found, by its name in metrics.jsonl or in a summary.

    >>> _interval_of("eval/score"), _interval_of("eval/gold/vader"), _interval_of("gold/vader")
    ('eval/score_ci', 'eval/gold_ci/vader', 'gold_ci/vader')
    """
    before, gold, reward = name.partition("gold/")
    return f"{before}gold_ci/{reward}" if gold else f"{name}_ci"


def _is_interval(name: str) -> bool:
    """Whether a figure is such a half-width; a gold reward may have any name.

    >>> [_is_interval(name) for name in ("eval/score_ci", "gold_ci/vader", "eval/gold/social_circle", "gold/my_ci")]
    [True, True, False, False]
    """
    return name.removeprefix("eval/").startswith("gold_ci/") or (name.endswith("_ci") and "gold/" not in name)


def _panel(runs: Sequence[Run], title: str, from_zero: bool, quantities: Sequence[tuple[str, str]]) -> charts.Chart:
    from rlhf_accel.runs.report import charts

    lines, several = [], len(runs) > 1
    for number, run in enumerate(runs):
        trained = 0
        for name, label in quantities:
            values, points = run.column(name), name.startswith("eval/")
            if all(math.isnan(value) for value in values):
                continue
            half = run.column(_interval_of(name)) if points else None
            told = f"{_short(run.name)}{f', {label}' if label and trained else ''}" if several else label
            # One run: a colour for each line that training draws; several: a colour for each run.
            colour = number if several else (1 if points else 0)
            lines.append(
                charts.Line(
                    x=run.steps(),
                    y=values,
                    label=told if len(quantities) > 1 or several else "",
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
    marks = sorted({step for run in runs for step in skipped_steps(run)}) if title in _UPDATES else []
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
    """A run is named once, by its solid line; dashes and dots are told by the caption."""
    seen: set[int] = set()
    kept = []
    for line in lines:
        kept.append(replace(line, label="" if line.colour in seen else line.label))
        seen.add(line.colour)
    return kept


def _caption(quantities: Sequence[tuple[str, str]], several: bool) -> str:
    """What each line means; where colours are the runs', also how it is drawn."""
    if len(quantities) == 1:
        return _meaning(quantities[0][0])
    told, dashes = [], iter((" (solid)", " (dashed)"))
    for name, label in quantities:
        drawn = " (dots)" if name.startswith("eval/") else next(dashes)
        told.append(f"{label}{drawn if several else ''}: {_meaning(name)}")
    return "; ".join(told)


def _meaning(name: str) -> str:
    metric = _metric(name)
    return ", ".join(part for part in (metric.meaning, metric.reduction) if part) or name


def _phases(run: Run, *, alone: bool) -> charts.Chart:
    """Seconds of a step by phase; what no phase claims is the rest."""
    from rlhf_accel.runs.report import charts

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


def skipped_steps(run: Run) -> list[float]:
    """Steps in which an update was skipped: where the count, which is a sum over steps, has grown."""
    counts = run.column("optim/skipped_steps")
    return [step for step, before, now in zip(run.steps(), [0.0, *counts], counts, strict=False) if now > before]


def frontier_charts(runs: Sequence[Run]) -> list[charts.FrontierChart]:
    """One chart: the curves of the first run that has them, and the evaluations of all that have."""
    from rlhf_accel.runs.report import charts

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
                    kl_low=[_or(point.get("kl_low"), point["kl"]) for point in points],
                    kl_high=[_or(point.get("kl_high"), point["kl"]) for point in points],
                    names=[str(point.get("name", "")) for point in points],
                    dashed=way > 0,
                )
            )
    samples = f"{found.samples} samples of the reference for each of {found.prompts} prompts"
    shared = f"; the curves are those of {first.name}" if len(runs) > 1 else ""
    unknown = "" if found.no_share is None else f"; what lies beyond is not known: {found.no_share}"
    return [
        charts.FrontierChart(
            name="frontier",
            title="What the KL bought",
            caption=f"gain in score over the reference against KL, beside best-of-n and the best that any policy "
            f"reaches at that KL; from {samples}; bars and bands are 95 % intervals{shared}{unknown}",
            best_of_n=_curve([vars(point) for point in found.best_of_n]),
            sizes=[point.n for point in found.best_of_n],
            optimum=_curve([vars(point) for point in found.optimum]),
            bound=_curve([vars(point) for point in found.bound] if found.no_share is None else []),
            reliable_kl=found.reliable_kl,
            paths=tuple(paths),
        )
    ]


def _curve(points: Sequence[Mapping[str, Any]]) -> charts.Curve:
    from rlhf_accel.runs.report import charts

    return charts.Curve(
        kl=[point["kl"] for point in points],
        gain=[point["gain"] for point in points],
        low=[_or(point.get("low"), point["gain"]) for point in points],
        high=[_or(point.get("high"), point["gain"]) for point in points],
    )


def _or(value: Any, other: float) -> float:
    """The value, or the other where it is not known."""
    number = _number(value)
    return other if math.isnan(number) else number


def _in_order(points: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By step, so that they are the path of the run; of one step only the last, which was measured better.

    A model whose adapter was scaled is no part of it.
    """
    by_step: dict[Any, Mapping[str, Any]] = {}
    for point in points:
        step, name = point.get("step"), str(point.get("name"))
        if "@" not in name:
            by_step[step if isinstance(step, int) else name] = point
    return sorted(by_step.values(), key=lambda point: _or(point.get("step"), math.inf))


def _ways(points: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The path of the run; then, for each model whose adapter was scaled, the way from it back towards the base."""
    scaled: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        model, at, _ = str(point.get("name")).partition("@")
        if at:
            scaled.setdefault(model, [p for p in points if p.get("name") == model]).append(point)
    path = _in_order(points)
    back = [sorted(way, key=lambda point: -point["kl"]) for way in scaled.values()]
    return [path, *back] if path or back else []


def _short(name: str) -> str:
    """A run's name where there is little room."""
    return name if len(name) <= 20 else f"…{name[-19:]}"


def _stem(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def page(runs: Sequence[Run], figures: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. Everything that a run wrote is escaped, and a security policy in it lets nothing be fetched."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tidy"] = _tidy
    source = _TEMPLATE.read_text(encoding="utf-8")
    script = source[source.index("<script>") + len("<script>") : source.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    samples, left_out = shown_samples(runs)
    from rlhf_accel.runs.report.charts import COLOURS

    return environment.from_string(source).render(
        title=", ".join(run.name for run in runs),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        script_hash=digest,
        runs=runs,
        colours=COLOURS,
        states=[state(run) for run in runs],
        headlines=headlines(runs),
        figures=[{**figure, "svg": Markup(figure["svg"])} for figure in figures],
        without_frontier=[run for run in runs if run.frontier is None],
        samples=samples,
        samples_left_out=left_out,
        steps=sorted({row["step"] for row in samples}),
        held_out=[(run, run.summary.get("samples") or []) for run in runs if run.summary],
        models=_models(runs),
        config=config_rows(runs),
        environment=environment_rows(runs),
    )


def state(run: Run) -> str:
    """Whether the run has ended, as far as its folder tells."""
    last = int(run.rows[-1]["step"])
    if run.summary is not None:
        return f"ended after step {run.summary.get('steps', last)}"
    total = (run.config or {}).get("run.total_steps")
    return f"still going, or stopped, after step {last}" + (f" of {total}" if total else "")


def headlines(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of what matters most, with a cell for each run; rows that no run has are left out."""
    columns = [_headline(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def _headline(run: Run) -> dict[str, str]:
    summary = run.summary or {}
    base, trained = summary.get("base") or {}, summary.get("trained") or {}
    evaluated = [row for row in run.rows if not math.isnan(_number(row.get("eval/score")))]
    cells: dict[str, str] = {}
    if base:
        cells["Held-out score before"] = _with_half(base, "score", "+.3f")
    if trained:
        cells["Held-out score after"] = _with_half(trained, "score", "+.3f")
    elif evaluated:
        cells[f"Held-out score, step {evaluated[-1]['step']}"] = _figure(evaluated[-1]["eval/score"], "+.3f")
    if not trained:
        cells["Training score, last step"] = _figure(run.rows[-1].get("objective/score"), "+.3f")
    if "gain" in summary:
        cells["Gain, in standard deviations of the base"] = _figure(summary["gain"], "+.2f")
    kl = trained.get("kl", run.rows[-1].get("objective/kl"))
    cells["KL to the reference, nats per response"] = _figure(kl, ".2f")
    drawn_from = summary.get("sampling")
    if isinstance(drawn_from, Mapping):
        cells["Responses drawn at"] = in_words(drawn_from)
    share = _share(run)
    if share:
        cells["Share of the best gain at that KL"] = share
    if "win_rate" in trained:
        cells["Wins over the base"] = _figure(trained["win_rate"], ".0%")
    for name in trained:
        if name.startswith("gold/") and name in base:
            before, after = (_figure(figures[name], "+.3f") for figures in (base, trained))
            cells[f"{name.removeprefix('gold/')}, not trained on"] = f"{before} → {after}"
    cells["Steps"] = str(run.rows[-1]["step"])
    seconds = _number(summary.get("seconds")) if summary else sum(v for v in run.column("time/step") if v == v)
    cells["Time"] = _clock(seconds)
    memory = [value for value in run.column("perf/peak_memory_mib") if value == value]
    if memory:
        cells["Peak memory of a process"] = f"{max(memory) / 1024:.2f} GiB"
    skipped = skipped_steps(run)
    if skipped:
        cells["Steps with a skipped update"] = str(len(skipped))
    return cells


def _with_half(figures: Mapping[str, Any], name: str, form: str) -> str:
    half = _number(figures.get(f"{name}_ci"))
    return _figure(figures[name], form) + ("" if math.isnan(half) else f" ± {half:{form.removeprefix('+')}}")


def _figure(value: Any, form: str) -> str:
    """A figure as text; those that were not finite are null in a run's files."""
    number = _number(value)
    return "not known" if math.isnan(number) else f"{number:{form}}"


def _share(run: Run) -> str:
    """Of the run's last model, as the frontier's points tell it; where they do not, from the curves."""
    path = _in_order(run.points)
    last = next((point for point in run.points if point.get("name") == "final"), path[-1] if path else None)
    if run.frontier is None or last is None:
        return ""
    if run.frontier.no_share is not None:
        return f"not known: {run.frontier.no_share}"
    share = share_of_optimum(run.frontier, last["kl"], last["gain"])
    if share is None:
        return ""
    return f"{'at least ' if share.is_lower_bound else ''}{share.value:.0%} ({last.get('name', '')})"


def _clock(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> _clock(4), _clock(3725)
    ('0:04', '1:02:05')
    """
    if math.isnan(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shown_samples(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], int]:
    """Rows of samples.jsonl with their run's number, and how many were left out: of many steps some in the middle."""
    rows = [
        {"prompt": "", "response": "", **row, "run": number}
        for number, run in enumerate(runs)
        for row in run.samples
        if isinstance(row.get("step"), int)
    ]
    steps = sorted({row["step"] for row in rows})
    kept = len(steps)
    while kept > 2 and len(rows) * kept > _MOST_SAMPLES * len(steps):
        kept -= 1
    chosen = {steps[round(n * (len(steps) - 1) / max(kept - 1, 1))] for n in range(kept)}
    shown = [row for row in rows if row["step"] in chosen]
    return shown, len(rows) - len(shown)


def _models(runs: Sequence[Run]) -> list[tuple[Run, list[str], list[tuple[str, list[Any]]], str]]:
    """evaluation.json of each run as a table: names of the models, rows of figures, and what they were drawn from."""
    tables = []
    for run in runs:
        models = (run.evaluation or {}).get("models")
        if isinstance(models, dict) and all(isinstance(figures, dict) for figures in models.values()):
            keys = [k for k in dict.fromkeys(k for figures in models.values() for k in figures) if not _is_interval(k)]
            rows = [(key, [(f.get(key), f.get(_interval_of(key))) for f in models.values()]) for key in keys]
            drawn_from = (run.evaluation or {}).get("sampling")
            said = f", drawn at {in_words(drawn_from)}" if isinstance(drawn_from, dict) else ""
            tables.append((run, list(models), rows, said))
    return tables


def config_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Keys with a value for each run: those that differ between runs first, then from the defaults, then the rest."""
    defaults = flatten(yaml.safe_load(to_yaml(Config())))
    keys = dict.fromkeys(key for run in runs for key in run.config or {})
    rows = []
    for key in keys:
        values = [(run.config or {}).get(key) for run in runs]
        rows.append(
            {
                "key": key,
                "values": values,
                "differs": any(value != values[0] for value in values),
                "changed": any(value != defaults.get(key) for value in values),
                "default": defaults.get(key),
            }
        )
    return sorted(rows, key=lambda row: (not row["differs"], not row["changed"]))


def environment_rows(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    columns = [flatten(run.environment or {}) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name) for column in columns]) for name in names]


def _tidy(value: Any) -> str:
    """A value in a table: figures to four digits, lists without brackets.

    >>> _tidy(0.123456), _tidy([1, "a"]), _tidy(None), _tidy(True), _tidy(12345678)
    ('0.1235', '1, a', 'none', 'true', '12345678')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_tidy, value)) or "none"
    return str(value)
