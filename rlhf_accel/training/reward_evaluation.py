"""Evaluation of a trained reward model: its metrics, its normalization, and the record of how it scores texts.

Knows scores and feedback; knows no training loop and no rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_accel.algorithm import calibration
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.data import reward_texts
from rlhf_accel.data.feedback import Feedback
from rlhf_accel.data.reward_texts import Probe, Record
from rlhf_accel.models.probes import trained_scored
from rlhf_accel.reward import Classifier
from rlhf_accel.system.arithmetic import exact_products
from rlhf_accel.system.errors import RunFailed

# Number of texts for the mean and the standard deviation of the scores, and the seed that draws them.
_NORMALIZED_TEXTS, _NORMALIZED_SEED = 2048, 7


@dataclass(frozen=True)
class Kept:
    """Training texts that are recorded, so that a later check can compare their scores."""

    texts: tuple[str, ...]
    ids: list[list[int]]  # as read in training
    scores: Tensor  # (N, K), fp32, by the model in memory, before normalization
    dtype: torch.dtype  # of the weights that computed the scores: bf16 under DeepSpeed in bf16, else fp32


def write_record(
    folder: Path,
    record: Record,
    labels: tuple[str, ...],
    kept: Kept,
    shift: float,
    scale: float,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write the record of how texts were formed beside the model, with the `kept` texts and their scores.

    The scores come from the written model, which reads the texts as PPO will. Raises `RunFailed` if they are not
    (score - shift) / scale of the scores by the model in memory, or if the ids differ from those of the training.
    """
    reward_texts.write(folder, record)
    alone = record.turns is not None and len(record.turns) == 1
    config = RewardConfig(
        model=str(folder),
        label=labels[0],
        dtype="fp32",
        batch_size=1,
        format="chat" if record.format == "chat" else "plain",
        text="response" if alone else "full",
    )
    with exact_products():  # recorded scores must not depend on this machine
        classifier = Classifier(config, str(folder), torch.device("cpu"), trust_remote_code=trust_remote_code)
        rows, _ = classifier.encoded(kept.texts)
        scores = torch.cat([classifier.logits([row]) for row in rows]) if rows else kept.scores
        ids = [row["input_ids"] for row in rows]
        # On the scale of the model in memory, whose rounding is a share of these scores, not of the shifted ones.
        raw = scores * scale + shift
        finding = trained_scored(kept.texts, ids, raw, kept.ids, kept.scores, kept.dtype)
    if not finding.passed:
        raise RunFailed(f"the written model is not the trained one: {finding.message}")
    probes = [
        Probe(text=text, ids=row, scores=score)
        for text, row, score in zip(kept.texts, ids, scores.tolist(), strict=True)
    ]
    reward_texts.write(folder, replace(record, probes=probes))


def tuning_loss(objective: str, tuning: Feedback, scores: np.ndarray) -> float:
    """The loss that chooses the best checkpoint: mean squared error of ratings, else mean negative log-likelihood in
    nats.

    `scores` (N, K) belong to the tuning texts.
    """
    if objective == "ratings":
        assert tuning.targets is not None
        return float(np.mean((scores[:, 0] - tuning.targets) ** 2))
    return calibration.negative_log_likelihood(*_answers(objective, tuning, scores))


def figures(
    objective: str, tuning: Feedback, tuned: np.ndarray, held: Feedback, reported: np.ndarray
) -> tuple[dict[str, float], dict[str, calibration.Reliability]]:
    """Metrics of the scores (N, K) of held-out texts, and the reliability of their probabilities before and after a
    temperature, which is fitted on the scores of the tuning texts.

    The probabilities are those of the preferred text of each pair for ratings and pairs, and those of the most likely
    class for labels.
    """
    found: dict[str, float] = {}
    if objective == "ratings":
        assert held.targets is not None
        found |= calibration.agreement(reported[:, 0], held.targets)
    logits, classes = _answers(objective, held, reported)
    name = "reward/accuracy" if objective == "labels" else "reward/pair_accuracy"
    found[name] = calibration.accuracy(logits, classes)
    temperature = calibration.fit_temperature(*_answers(objective, tuning, tuned))
    curves = {
        "before": calibration.reliability(logits, classes),
        "after": calibration.reliability(logits, classes, temperature),
    }
    found["reward/nll"] = calibration.negative_log_likelihood(logits, classes)
    found["reward/ece"] = curves["before"].error
    found["reward/ece_calibrated"] = curves["after"].error
    found["reward/temperature"] = temperature
    return found, curves


def _answers(objective: str, part: Feedback, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K) and correct classes (N,). For pairs the classes are the two texts; the preferred one is class 0."""
    if objective == "labels":
        assert part.targets is not None
        return scores, part.targets
    return calibration.preference_logits(scores[:, 0], part.pairs), np.zeros(len(part.pairs), dtype=np.int64)


def normalization(
    config: RewardTrainingConfig, score: Callable[[tuple[str, ...]], np.ndarray], train: Feedback
) -> tuple[float, float]:
    """The shift that model.normalize subtracts from the scores, and the scale that it divides them by."""
    how = config.model.normalize
    if config.data.objective != "pairs" or how == "none":
        return 0.0, 1.0
    places = np.random.default_rng(_NORMALIZED_SEED).permutation(len(train.texts))[:_NORMALIZED_TEXTS]
    scores = score(tuple(train.texts[i] for i in places))
    spread = float(scores.std())
    # Scores that are all equal are not scaled: the model is useless, and its metrics show it.
    return float(scores.mean()), 1.0 if how == "mean" or not spread > 0 else spread
