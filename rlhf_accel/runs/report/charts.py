"""Charts as data, and how matplotlib draws them.

Knows axes, colours and labels; needs the `report` extra. Knows no file of a run and no page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too faint on paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_QUIET = "#888888"  # axes and marks: readable on white and on black
_TEXT = "#222222"  # replaced by the text colour of the page
_STYLES = ("-", "--", ":")
_SIZE, _WIDE = (4.5, 2.9), (5.4, 4.0)  # inches; a point is about a CSS pixel on a phone
_FEW = 40  # up to this number of steps, each has a dot
_SETTINGS: dict[Any, Any] = {  # matplotlib types the keys by their names
    "svg.fonttype": "none",  # text stays text, for search, scaling and screen readers
    # Verdana has the character widths of DejaVu Sans, with which text is placed.
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9.5,
    "text.parse_math": False,  # the name of a run may not be valid TeX
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _QUIET,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One quantity over steps (or KL); unknown values are nan, `half` is the half-width of a 95 % interval."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    colour: int = 0
    style: int = 0
    half: Sequence[float] | None = None
    points: bool = False
    """Measured at some steps only: dots with their intervals, and a thin line between them."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`name` is that of the file; `y` is the unit of the axis; `marks` are steps with a vertical line."""

    name: str
    title: str
    y: str
    caption: str
    lines: tuple[Line, ...]
    x: str = "step"
    stacked: bool = False
    marks: tuple[float, ...] = ()
    from_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A frontier's curve: KL, gain and the gain's interval."""

    kl: Sequence[float]
    gain: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run's evaluations in the plane of KL and gain, in order of steps; the last one is labelled.

    A dashed course leads from a model back to the base.
    """

    label: str
    colour: int
    curve: Curve
    kl_low: Sequence[float]
    kl_high: Sequence[float]
    names: Sequence[str]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class FrontierChart:
    """Runs beside the frontier. Beyond `reliable_kl` the optimum is unknown, and `bound` is an upper bound."""

    name: str
    title: str
    caption: str
    best_of_n: Curve
    sizes: Sequence[int]
    optimum: Curve
    bound: Curve
    reliable_kl: float
    paths: tuple[Course, ...]


def draw(chart: Chart | FrontierChart) -> Figure:
    """The chart as a figure."""
    with mpl.rc_context(_SETTINGS):
        wide = isinstance(chart, FrontierChart)
        figure = Figure(figsize=_WIDE if wide else _SIZE, layout="constrained")
        axes = figure.add_subplot()
        legend = _has_legend(chart)
        axes.set_title(chart.title, pad=34 if wide else 20 if legend else 6)
        if isinstance(chart, FrontierChart):
            _draw_frontier(axes, chart)
        else:
            _draw_lines(axes, chart)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=not wide, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
        axes.tick_params(length=2.5)
        return figure


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element for a page; its ids do not clash with those of figures with other names."""
    text = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)  # the same in each figure
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None
    head = f'<svg {box[0]} role="img" aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    drawn = re.sub(r"<svg[^>]*>", lambda _: f"{head}<title>{escape(title)}</title>", drawn, count=1)
    return drawn.replace(_TEXT, "currentColor")


def png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG."""
    with mpl.rc_context(_SETTINGS):
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def _has_legend(chart: Chart | FrontierChart) -> bool:
    return isinstance(chart, FrontierChart) or bool(chart.marks) or any(line.label for line in chart.lines)


def _draw_lines(axes: Axes, chart: Chart) -> None:
    if chart.stacked:
        series = [[0.0 if math.isnan(value) else value for value in line.y] for line in chart.lines]
        colours = [COLOURS[line.colour] for line in chart.lines]
        labels = [line.label for line in chart.lines]
        if len(chart.lines[0].x) == 1:  # an area of one step has no width
            base = 0.0
            for (value,), colour, label in zip(series, colours, labels, strict=True):
                axes.bar(chart.lines[0].x, [value], 0.5, bottom=base, color=colour, label=label)
                base += value
        else:
            axes.stackplot(chart.lines[0].x, series, labels=labels, colors=colours, alpha=0.85, linewidth=0)
            axes.margins(x=0)
    else:
        for line in chart.lines:
            _draw_line(axes, line)
    if chart.from_zero or chart.stacked:
        axes.set_ylim(bottom=0)
    for number, step in enumerate(chart.marks):
        label = "update skipped" if number == 0 else ""
        axes.axvline(step, color=_QUIET, linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if _has_legend(chart):
        _legend_above(axes, columns=4)


def _legend_above(axes: Axes, columns: int) -> None:
    """Place the legend between title and axes, where it hides no curve."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=columns, columnspacing=1.2, handlelength=1.6)


def _draw_line(axes: Axes, line: Line) -> None:
    colour = COLOURS[line.colour]
    if line.points:
        known = [number for number, value in enumerate(line.y) if not math.isnan(value)]
        x, y = [line.x[n] for n in known], [line.y[n] for n in known]
        half = None if line.half is None else [line.half[n] for n in known]
        bars = axes.errorbar(x, y, yerr=half, label=_name(line.label), capsize=2, elinewidth=1, color=colour)
        bars.lines[0].set(marker="o", markersize=5, linewidth=0.8, linestyle="--")
        return
    dot = "." if len(line.x) <= _FEW else None
    axes.plot(line.x, line.y, _STYLES[line.style], color=colour, marker=dot, label=_name(line.label))


def _draw_frontier(axes: Axes, chart: FrontierChart) -> None:
    best, optimum, bound = chart.best_of_n, chart.optimum, chart.bound
    curves = [best, *(path.curve for path in chart.paths)]
    right = 1.06 * max([0.5, chart.reliable_kl, *(kl for curve in curves for kl in curve.kl)])
    if optimum.kl:
        axes.fill_between(optimum.kl, optimum.low, optimum.high, color=_QUIET, alpha=0.3, linewidth=0)
        axes.plot(optimum.kl, optimum.gain, color=_TEXT, linewidth=1.8, label="optimum, 95 %")
        seen = [*(kl for kl in bound.kl if kl < right), right]
        heights = np.interp(seen, bound.kl, bound.gain)
        axes.plot(seen, heights, color=_TEXT, linewidth=1.2, linestyle=(0, (4, 3)), label="no policy is above")
        axes.axvline(chart.reliable_kl, color=_QUIET, linewidth=1, linestyle=":")
        where = (chart.reliable_kl, 0.01)
        axes.annotate(
            "known up to here",
            where,
            (3, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=8,
        )
    spread, green = _spread(best.gain, best.low, best.high), COLOURS[2]
    axes.errorbar(best.kl, best.gain, yerr=spread, color=green, marker="s", capsize=2, linewidth=1, label="best of n")
    for size, kl, gain in zip(chart.sizes, best.kl, best.gain, strict=True):
        if size > 1:
            axes.annotate(str(size), (kl, gain), (3, -10), textcoords="offset points", fontsize=8, color=green)
    for path in chart.paths:
        _draw_path(axes, path)
    axes.set_xlim(-0.03 * right, right)
    axes.set_xlabel("KL to the reference, nats per response")
    axes.set_ylabel("gain over the reference, score")
    _legend_above(axes, columns=3)


def _draw_path(axes: Axes, path: Course) -> None:
    curve, colour = path.curve, COLOURS[path.colour]
    sideways, upright = _spread(curve.kl, path.kl_low, path.kl_high), _spread(curve.gain, curve.low, curve.high)
    bars = axes.errorbar(
        curve.kl, curve.gain, yerr=upright, xerr=sideways, label=_name(path.label), color=colour, elinewidth=0.8
    )
    bars.lines[0].set(marker="o", markersize=5, linewidth=1.2, linestyle=(0, (2, 2)) if path.dashed else "-")
    if curve.kl:
        place = (curve.kl[-1], curve.gain[-1])
        axes.annotate(path.names[-1], place, (-4, 7), textcoords="offset points", fontsize=8, color=colour, ha="right")


def _spread(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Distances of the ends of each interval below and above its value; at least 0, also after rounding."""
    below = [max(value - end, 0.0) for value, end in zip(values, low, strict=True)]
    return [below, [max(end - value, 0.0) for value, end in zip(values, high, strict=True)]]


def _name(label: str) -> str | None:
    """A label for a legend: matplotlib leaves out labels that start with an underscore, and a run's name may."""
    return f" {label}" if label.startswith("_") else label or None
