"""How good a policy is on held-out prompts: always the same ones, with the same random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_accel import ppo
from rlhf_accel.metrics import Stopwatch
from rlhf_accel.reward import Reward
from rlhf_accel.rollout import Sampler
from rlhf_accel.types import PromptBatch, Rollout

# Step number of the sampling stream: training steps count from 1, and the calibration uses 0. The seed is fixed, so
# that runs with different seeds are compared on the same random numbers.
EVALUATION_STEP = 2**31
EVALUATION_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """score and its standard deviation over responses; kl in nats per response (k1); the rollout behind them."""

    score: float
    score_std: float
    kl: float
    rollout: Rollout

    def figures(self) -> dict[str, float]:
        return {"score": self.score, "score_std": self.score_std, "kl": self.kl}


def evaluate(sampler: Sampler, reward: Reward, prompts: PromptBatch) -> Evaluation:
    """Sample a response to every prompt and score it; on every rank alike.

    Figures of a rollout that holds numbers which are not finite are not finite either.
    """
    rollout = sampler.rollout(prompts, reward, seed=EVALUATION_SEED, step=EVALUATION_STEP, watch=Stopwatch())
    kl = ppo.masked_row_sum(rollout.logprobs - rollout.ref_logprobs, rollout.sequences.response_mask)
    return Evaluation(
        score=float(rollout.scores.mean()),
        score_std=float(rollout.scores.std(correction=0)),
        kl=float(kl.mean()),
        rollout=rollout,
    )


def compare(base: dict[str, float], trained: Evaluation) -> dict[str, Any]:
    """Figures before and after, and the gain: the rise of the mean score in standard deviations of the base's."""
    comparison: dict[str, Any] = {"base": base, "trained": trained.figures()}
    if base["score_std"] > 0:
        comparison["gain"] = (trained.score - base["score"]) / base["score_std"]
    return comparison


def first_samples(evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    """The first `count` responses and their scores, to be shown beside later ones by `sample_pairs`."""
    rows = zip(evaluation.rollout.texts[:count], evaluation.rollout.scores.tolist()[:count], strict=True)
    return [{"base": text, "base score": score} for text, score in rows]


def sample_pairs(base: list[dict[str, Any]], trained: Evaluation) -> list[dict[str, Any]]:
    """`first_samples` of the evaluation before training, with the responses to the same prompts now."""
    rollout = trained.rollout
    after = zip(rollout.prompts, rollout.texts, rollout.scores.tolist(), strict=True)
    return [
        {"prompt": prompt, **before, "trained": text, "trained score": score}
        for before, (prompt, text, score) in zip(base, after, strict=False)
    ]
