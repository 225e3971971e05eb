"""Agreement of scores with people, and the calibration of their probabilities: pure maths of reward models.

Knows tensors and arrays; knows no model, no text, no config and no rank.

Shapes: `N` texts, `P` pairs, `K` classes; a pair is (chosen, rejected).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# Two texts are a pair for the pairwise agreement if their mean ratings are further apart than this: another group of
# raters might order closer ones differently.
PAIR_MARGIN = 0.5

BINS = 10

# The inverse temperature is searched between exp(-this) and exp(this), in units of the mean size of the logits.
_LOG_RANGE = 8.0


def preference_loss(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], margins: Float[Tensor, " P"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood, in nats, of the preferences under Bradley and Terry's model, where the chosen text
    has to win by a margin: -log sigmoid(chosen - rejected - margin) (Touvron et al. 2023, equation 2).

    >>> preference_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.0])).item()  # log 2
    0.6931471824645996
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected - margins).mean()


def preference_logits(scores: Float[np.ndarray, " N"], pairs: Int[np.ndarray, "P 2"]) -> Float[np.ndarray, "P 2"]:
    """Logits of the two answers to which text of a pair is preferred; the right answer is the first."""
    return np.stack([scores[pairs[:, 0]], scores[pairs[:, 1]]], axis=1)


def accuracy(logits: Float[np.ndarray, "N K"], classes: Int[np.ndarray, " N"]) -> float:
    """Share of rows whose class has the largest logit, ties counting as wrong; nan for no row."""
    return float(_right(logits, classes).mean()) if len(logits) else math.nan


def negative_log_likelihood(logits: Float[np.ndarray, "N K"], classes: Int[np.ndarray, " N"]) -> float:
    """Mean of -log softmax(logits)[class], in nats; nan for no row."""
    if not len(logits):
        return math.nan
    return float((_log_sum_exp(logits) - logits[np.arange(len(logits)), classes]).mean())


def fit_temperature(logits: Float[np.ndarray, "N K"], classes: Int[np.ndarray, " N"]) -> float:
    """The temperature T that makes softmax(logits / T) most likely to give the classes (Guo et al. 2017, "On
    Calibration of Modern Neural Networks", section 4.2).

    nan where no finite T above 0 is the likeliest: for no row, for rows all of which are right (the smaller the
    better), and for logits that do no better than chance.
    """
    if not len(logits):
        return math.nan
    scale = float(np.abs(logits - logits.mean(axis=1, keepdims=True)).mean())
    if not scale > 0:
        return math.nan
    target = logits[np.arange(len(logits)), classes]

    def slope(log_inverse: float) -> float:
        """Of the negative log-likelihood, which is convex in 1 / T, by 1 / T."""
        weights = np.exp(math.exp(log_inverse) * (logits - logits.max(axis=1, keepdims=True)) / scale)
        return float(((weights * logits).sum(axis=1) / weights.sum(axis=1) - target).mean())

    low, high = -_LOG_RANGE, _LOG_RANGE
    if not slope(low) < 0 < slope(high):
        return math.nan
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return scale / math.exp((low + high) / 2)


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Answers in bins of equal mass, from the least to the most confident: empty bins are left out."""

    confidence: Float[np.ndarray, " bins"]
    """Mean probability that the model gave to its answer."""
    accuracy: Float[np.ndarray, " bins"]
    """Share of the answers that were right."""
    count: Int[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy, bins weighted by their answers."""
        if not len(self.count):
            return math.nan
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.count))


def reliability(
    logits: Float[np.ndarray, "N K"], classes: Int[np.ndarray, " N"], temperature: float = 1.0, bins: int = BINS
) -> Reliability:
    """How often the likeliest class under softmax(logits / temperature) is right, by its probability.

    Bins hold equally many rows but for one (Nixon et al. 2019, "Measuring Calibration in Deep Learning").
    Where several classes are equally likely, the answer counts as wrong. No bins for a temperature of nan.

    >>> # Probabilities 0.8, 0.8 and 0.6; the last two are wrong. Bins (0.6), (0.8, 0.8): |0.6 - 0|/3 + |0.8 - 1/2| 2/3.
    >>> logits = np.log([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    >>> round(reliability(logits, np.array([0, 0, 1]), bins=2).error, 6)
    0.4
    """
    if math.isnan(temperature) or not len(logits):
        return Reliability(confidence=np.zeros(0), accuracy=np.zeros(0), count=np.zeros(0, dtype=int))
    scaled = logits / temperature
    best = scaled.max(axis=1)
    confidence = np.exp(best - _log_sum_exp(scaled))
    right = _right(scaled, classes)
    parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]
    return Reliability(
        confidence=np.array([confidence[part].mean() for part in parts]),
        accuracy=np.array([right[part].mean() for part in parts]),
        count=np.array([len(part) for part in parts]),
    )


def agreement(predictions: Float[np.ndarray, " N"], targets: Float[np.ndarray, " N"]) -> dict[str, float]:
    """How well predictions (N,) agree with mean ratings (N,); nan where no row or pair can tell.

    `reward/accuracy`: share of rows whose sign is right, rows rated exactly 0 left out. `reward/pairwise_agreement`:
    share of the pairs rated more than `PAIR_MARGIN` apart that are ordered the same way, ties counting as wrong.

    >>> agreement(np.array([2.0, 1.0, -3.0]), np.array([1.0, 2.0, -1.0]))["reward/pairwise_agreement"]
    0.6666666666666666
    """
    signed = targets != 0
    right = (predictions > 0) == (targets > 0)
    pairs = ordered = 0
    for prediction, target in zip(predictions, targets, strict=True):
        below = target - targets > PAIR_MARGIN
        pairs += int(below.sum())
        ordered += int((predictions[below] < prediction).sum())
    spread = len(targets) > 1 and predictions.std() > 0 and targets.std() > 0
    return {
        "reward/accuracy": float(right[signed].mean()) if signed.any() else math.nan,
        "reward/pairwise_agreement": ordered / pairs if pairs else math.nan,
        "reward/mse": float(np.mean((predictions - targets) ** 2)),
        "reward/pearson": float(np.corrcoef(predictions, targets)[0, 1]) if spread else math.nan,
    }


def _right(logits: Float[np.ndarray, "N K"], classes: Int[np.ndarray, " N"]) -> np.ndarray:
    alone = (logits == logits.max(axis=1, keepdims=True)).sum(axis=1) == 1
    right: np.ndarray = (logits.argmax(axis=1) == classes) & alone
    return right


def _log_sum_exp(logits: Float[np.ndarray, "N K"]) -> Float[np.ndarray, " N"]:
    top = logits.max(axis=1)
    sums: np.ndarray = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return sums
