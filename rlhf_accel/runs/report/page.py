"""The report of one run or several: one self-contained HTML page, and its charts as images.

Knows the tables of the page, whose layout is in page.html; run_data.py reads runs, curves.py chooses charts. Works for
a run that has not ended too.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from rlhf_accel.algorithm.frontier import share_of_optimum
from rlhf_accel.config.distribution import in_words
from rlhf_accel.config.keys import flatten
from rlhf_accel.config.loading import to_yaml
from rlhf_accel.config.schema import Config
from rlhf_accel.runs.report.run_data import (
    Run,
    as_number,
    in_order,
    interval_of,
    is_interval,
    read_run,
    run_names,
    skipped_steps,
)
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.files import replace_text
from rlhf_accel.system.version import __version__

if TYPE_CHECKING:
    from rlhf_accel.runs.report import charts

PAGE = "report.html"
MOST_RUNS = 7  # as many as there are colours
_MOST_SAMPLES = 600  # rows that a phone can sort fast
_TEMPLATE = Path(__file__).with_name("page.html")


def after_training(folder: Path, say: Callable[[str], None]) -> None:
    """Write the report of a run that has ended, and print one line about it; an error is printed and not raised."""
    try:
        page, notes = write([folder])
    except Exception as error:  # a long run must not fail because of its report
        say(f"warning: no report ({' '.join(str(error).split())}); try: python -m rlhf_accel report {folder}")
        return
    say(f"report: {page}" + "".join(f"; {note}" for note in notes))


def write(folders: Sequence[Path], output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page to `output`, and a PNG of each chart into a folder beside it that is named after it.

    Returns the page's path, and notes about files that could not be read. Raises `ConfigError` if a folder is not a run
    or has no rows yet, if the page cannot be written, or if matplotlib is missing.
    """
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs: at most {MOST_RUNS} have colours of their own in a chart; name fewer")
    try:
        from rlhf_accel.runs.report import charts, curves
    except ModuleNotFoundError as error:
        raise ConfigError(f"the report is drawn with matplotlib ({error}): pip install 'matplotlib>=3.9'") from error
    runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
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
        drawn: list[charts.Chart | charts.FrontierChart] = [*curves.frontier_charts(runs), *curves.panels(runs)]
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


def page(runs: Sequence[Run], figures: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. All content of a run is escaped, and the page's security policy blocks requests."""
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
    """Whether the run has ended, according to its folder."""
    last = int(run.rows[-1]["step"])
    if run.summary is not None:
        return f"ended after step {run.summary.get('steps', last)}"
    total = (run.config or {}).get("run.total_steps")
    return f"running, or stopped, after step {last}" + (f" of {total}" if total else "")


def headlines(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of the main results, with a cell for each run; rows without any value are left out."""
    columns = [_headline(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def _headline(run: Run) -> dict[str, str]:
    summary = run.summary or {}
    base, trained = summary.get("base") or {}, summary.get("trained") or {}
    evaluated = [row for row in run.rows if not math.isnan(as_number(row.get("eval/score")))]
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
        kind, _, reward = name.partition("/")
        if kind in ("score", "gold") and reward and name in base:
            before, after = (_figure(figures[name], "+.3f") for figures in (base, trained))
            cells[f"{reward}, not trained on" if kind == "gold" else reward] = f"{before} → {after}"
    cells["Steps"] = str(run.rows[-1]["step"])
    seconds = as_number(summary.get("seconds")) if summary else sum(v for v in run.column("time/step") if v == v)
    cells["Time"] = _clock(seconds)
    memory = [value for value in run.column("perf/peak_memory_mib") if value == value]
    if memory:
        cells["Peak memory of a process"] = f"{max(memory) / 1024:.2f} GiB"
    skipped = skipped_steps(run)
    if skipped:
        cells["Steps with a skipped update"] = str(len(skipped))
    return cells


def _with_half(figures: Mapping[str, Any], name: str, form: str) -> str:
    half = as_number(figures.get(f"{name}_ci"))
    return _figure(figures[name], form) + ("" if math.isnan(half) else f" ± {half:{form.removeprefix('+')}}")


def _figure(value: Any, form: str) -> str:
    """A number as text; in a run's files, numbers that were not finite are null."""
    number = as_number(value)
    return "unknown" if math.isnan(number) else f"{number:{form}}"


def _share(run: Run) -> str:
    """The share of the optimum that the run's last model reaches, from the frontier."""
    path = in_order(run.points)
    last = next((point for point in run.points if point.get("name") == "final"), path[-1] if path else None)
    if run.frontier is None or last is None:
        return ""
    if run.frontier.no_share is not None:
        return f"unknown: {run.frontier.no_share}"
    share = share_of_optimum(run.frontier, last["kl"], last["gain"])
    if share is None:
        return ""
    return f"{'at least ' if share.is_lower_bound else ''}{share.value:.0%} ({last.get('name', '')})"


def _clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> _clock(4), _clock(3725)
    ('0:04', '1:02:05')
    """
    if math.isnan(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shown_samples(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], int]:
    """Rows of samples.jsonl with their run's number, and how many rows were left out, of steps in the middle."""
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
    """evaluation.json of each run as a table: names of the models, rows of numbers, and sampling settings."""
    tables = []
    for run in runs:
        models = (run.evaluation or {}).get("models")
        if isinstance(models, dict) and all(isinstance(figures, dict) for figures in models.values()):
            keys = [k for k in dict.fromkeys(k for figures in models.values() for k in figures) if not is_interval(k)]
            rows = [(key, [(f.get(key), f.get(interval_of(key))) for f in models.values()]) for key in keys]
            drawn_from = (run.evaluation or {}).get("sampling")
            sampling = f", drawn at {in_words(drawn_from)}" if isinstance(drawn_from, dict) else ""
            tables.append((run, list(models), rows, sampling))
    return tables


def config_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Keys with a value for each run: first those that differ between runs, then from the defaults, then the rest."""
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
    """A value for a table: numbers with four digits, lists without brackets.

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
