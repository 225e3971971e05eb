"""The files beside a trained reward model: its metrics, its config, a model card and a plot of its reliability."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path

from rlhf_accel.algorithm.calibration import BINS, Reliability
from rlhf_accel.config.loading import to_yaml
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.runs.json_lines import finite_or_none

PLOT = "reliability.png"

_MEANING = {
    "ratings": "a number, the `{target}` that people would give it: one output, no activation",
    "labels": "a label, {labels}: one output each, probabilities by softmax",
    "pairs": "a score, higher for what people prefer: one output, no activation",
}
_LOSS = {
    "ratings": "squared error",
    "labels": "cross entropy",
    "pairs": "the likelihood of the preferences (R.A. Bradley and M.E. Terry, 1952)",
}
_PROBABILITY = {
    "ratings": "that the better rated of two texts scores higher, sigmoid of the difference of their scores",
    "labels": "of the likeliest label, the softmax of the logits",
    "pairs": "that the preferred of two texts scores higher, sigmoid of the difference of their scores",
}
_NO_TEMPERATURE = "there are no tuning rows, or the model is right about all of them or no better than chance"


def describe(
    folder: Path,
    config: RewardTrainingConfig,
    labels: tuple[str, ...],
    sources: tuple[str, str, str],
    metrics: Mapping[str, float],
    curves: Mapping[str, Reliability],
) -> list[str]:
    """Write `reward_metrics.json` (null for nan), `reward_config.yaml`, the card and, with matplotlib, the plot.

    `sources` describe the data for training, for tuning and for the metrics. Returns messages for the user.
    """
    numbers = json.dumps(finite_or_none(metrics), indent=2)
    (folder / "reward_metrics.json").write_text(numbers + "\n", encoding="utf-8")
    (folder / "reward_config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    notes = []
    has_plot = importlib.util.find_spec("matplotlib") is not None and len(curves["before"].count) > 0
    if has_plot:
        plot_reliability(folder / PLOT, curves)
    elif len(curves["before"].count):
        notes.append(f"no {PLOT}: it needs matplotlib, pip install 'rlhf_accel[report]'")
    if math.isnan(metrics["reward/temperature"]):
        notes.append(f"reward/temperature and reward/ece_calibrated are nan: {_NO_TEMPERATURE}")
    (folder / "README.md").write_text(_card(config, labels, sources, metrics, has_plot), encoding="utf-8")
    return notes


def plot_reliability(path: Path, curves: Mapping[str, Reliability]) -> None:
    """Plot the share of correct answers by their probability, before and after the temperature, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="perfect")
    for (name, curve), marker in zip(curves.items(), "os", strict=True):
        if len(curve.count):
            axes.plot(curve.confidence, curve.accuracy, marker=marker, label=f"{name}, ECE {curve.error:.3f}")
    lowest = min(
        float(array.min()) for curve in curves.values() for array in (curve.confidence, curve.accuracy) if len(array)
    )
    axes.set(xlim=(lowest - 0.03, 1.03), ylim=(lowest - 0.03, 1.03), aspect="equal")
    axes.set(xlabel="probability of the answer", ylabel="share of correct answers")
    axes.legend(title="temperature")
    figure.savefig(path, dpi=150)


def _card(
    config: RewardTrainingConfig,
    labels: tuple[str, ...],
    sources: tuple[str, str, str],
    metrics: Mapping[str, float],
    has_plot: bool,
) -> str:
    data, (trained_on, tuned_on, reported_on) = config.data, sources
    meaning = _MEANING[data.objective].format(target=data.target_field, labels=" or ".join(f"`{x}`" for x in labels))
    rows = "".join(
        f"| `{name}` | {'-' if math.isnan(value) else format(value, '.4g')} |\n" for name, value in metrics.items()
    )
    card = f"""# Reward model

Gives a text {meaning}. Trained with `python -m rlhf_accel train-reward` from `{config.model.name_or_path}` on
{trained_on} by {_LOSS[data.objective]} (`reward_config.yaml`).

| figure on {reported_on} | value |
| --- | --- |
{rows}
`reward/ece` is the expected calibration error, in {BINS} bins of equal mass, of the probability
{_PROBABILITY[data.objective]}.
`reward/ece_calibrated` is the same with the scores divided by `reward/temperature`, fitted by likelihood on
{tuned_on}; the scores of the model are not divided by it. A dash stands for a metric that these data do not give: of
the temperature, where {_NO_TEMPERATURE}.
`reward_texts.json` records the form of the texts, with four of the training texts and their scores.
"""
    if not config.lora.merge:
        card += f"""
This is a peft adapter with its head, over that model:
`AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels={len(labels)})`.
"""
    if has_plot:
        card += f"\n![Share of correct answers by their probability]({PLOT})\n"
    if data.source == "embedded:movie_reviews":
        card += """
The human ratings are from C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014 (MIT licence); the snippets are from the review corpus of B. Pang and L. Lee, ACL 2004.
"""
    return card
