"""Edge cases of charts: names with a meaning for matplotlib, intervals reversed by rounding, a single step."""

from __future__ import annotations

import math

import pytest

from rlhf_accel.runs.report import charts
from rlhf_accel.runs.report.charts import Chart, Course, Curve, FrontierChart, Line

ODD = r"_run $\frac$ & <b>"


def chart(*lines: Line, **changed) -> Chart:
    return Chart(**{"name": "a", "title": ODD, "y": ODD, "caption": "", "lines": lines, **changed})


def frontier_chart(best: Curve, optimum: Curve, course: Course, reliable_kl: float = 0.2) -> FrontierChart:
    return FrontierChart(
        name="frontier",
        title=ODD,
        caption="",
        best_of_n=best,
        sizes=[1, 2],
        optimum=optimum,
        bound=optimum,
        reliable_kl=reliable_kl,
        paths=(course,),
    )


def named(figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [] if legend is None else [text.get_text().strip() for text in legend.get_texts()]


@pytest.mark.parametrize("points", [False, True])
def test_any_name_is_a_name(points: bool) -> None:
    """No TeX, no markup, and no underscore that would leave a line out of the legend."""
    figure = charts.draw(chart(Line(x=[1, 2], y=[1.0, 2.0], label=ODD, points=points)))
    assert named(figure) == [ODD]
    text = charts.svg(figure, "a", ODD)
    assert "<b>" not in text and text.count("&lt;b&gt;") >= 3 and "\\frac$" in text


def test_intervals_turned_by_rounding_and_unknown_ones_are_drawn() -> None:
    """A bootstrap of equal scores may put an interval's low end above the value, by a unit in the last place."""
    above = math.nextafter(0.5, 1.0)
    curve = Curve(kl=[0.0, 0.2], gain=[0.5, 0.5], low=[above, 0.4], high=[0.6, math.nextafter(0.5, 0.0)])
    course = Course(label=ODD, colour=1, curve=curve, kl_low=[0.1, 0.2], kl_high=[0.0, 0.3], names=["step 1", ODD])
    figure = charts.draw(frontier_chart(curve, curve, course))
    assert ODD in named(figure)
    assert ODD.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in charts.svg(figure, "frontier", ODD)


def test_a_frontier_of_a_reward_that_nothing_changes_has_no_optimum() -> None:
    none = Curve(kl=[], gain=[], low=[], high=[])
    best = Curve(kl=[0.0, 0.2], gain=[0.0] * 2, low=[0.0] * 2, high=[0.0] * 2)
    course = Course(label="run", colour=0, curve=none, kl_low=[], kl_high=[], names=[])
    drawn = frontier_chart(best, none, course, reliable_kl=0.0)
    assert "optimum, 95 %" not in named(charts.draw(drawn))


def test_one_step_of_phases_is_a_bar_and_more_are_areas() -> None:
    lines = [Line(x=[1], y=[value], label=label) for value, label in ((2.0, "a"), (math.nan, "b"), (1.0, "c"))]
    axes = charts.draw(chart(*lines, stacked=True)).axes[0]
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0.0, 2.0), (2.0, 0.0), (2.0, 1.0)]
    lines = [Line(x=[1, 2], y=[value] * 2, label="a") for value in (1.0, 2.0)]
    axes = charts.draw(chart(*lines, stacked=True)).axes[0]
    assert [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections] == [1.0, 3.0]


def test_evaluations_are_drawn_where_they_are_known() -> None:
    line = Line(x=[1, 2, 3], y=[math.nan, 1.0, 2.0], half=[0.0, 0.5, 0.25], points=True)
    axes = charts.draw(chart(line, from_zero=True)).axes[0]
    (bars,) = axes.containers
    assert [*bars.lines[0].get_xdata()] == [2, 3]
    assert [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()] == [[0.5, 1.5], [1.75, 2.25]]
    assert axes.get_ylim()[0] == 0
