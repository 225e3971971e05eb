"""Evaluation of a policy on held-out prompts: always the same ones, with the same random numbers.

Shapes: P prompts, K responses to each, B = P x K. A figure that is a mean over prompts has the half-width of its 95 %
interval beside it, see `mean_interval`. Knows no run and no folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_accel.algorithm.batches import PromptBatch, Rollout
from rlhf_accel.algorithm.masked import masked_row_sum
from rlhf_accel.reward import Reward, RewardError
from rlhf_accel.rollout.collector import Collector
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.rollout.scoring import score_terms

# Step number of the random numbers: training steps count from 1, and the calibration uses 0. The k-th responses to the
# prompts have the k-th number from here on. The seed is fixed, so that runs with different seeds are compared on the
# same random numbers.
EVALUATION_STEP = 2**31
EVALUATION_SEED = 0
_REPEATED = 4  # length of the n-grams in `self_repetition`


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of a policy's responses to P prompts, K to each.

    scores and kls (P, K), the latter in nats (k1); golds (P, K) by name, NaN for one that failed; rollout: the first
    response to each prompt. The figures, each over all responses:

    - score, kl, length (tokens up to and including the stop), eos_fraction (ended by a stop, not by the length limit)
      and gold/NAME are means; score_ci, kl_ci, gold_ci/NAME the half-widths of their 95 % intervals.
    - score_std: standard deviation of the scores.
    - score/NAME, score_ci/NAME: the same as score and score_ci for each of several rewards, on its own scale.
    - distinct_1, distinct_2 and self_repetition: see the functions of these names; over token ids.
    - reference_perplexity: see `perplexity`.
    - win_rate, win_rate_ci: only if the base's scores are known; see `wins`.
    """

    scores: Float[Tensor, "P K"]
    kls: Float[Tensor, "P K"]
    golds: Mapping[str, Float[Tensor, "P K"]]
    rollout: Rollout
    figures: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The figures by their names in metrics.jsonl."""
        return {f"eval/{name}": value for name, value in self.figures.items() if name != "score_std"}


def evaluate(
    collector: Collector,
    reward: Reward,
    prompts: PromptBatch,
    *,
    golds: Mapping[str, Reward] | None = None,
    base: Float[Tensor, "P K"] | None = None,
    samples: int = 1,
    say: Callable[[str], None] = lambda _: None,
    after: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Sample `samples` responses to every prompt and score them. Called by all ranks; the result is the same on all.

    `base` are the scores of the base's responses to the same prompts with the same random numbers. If a gold reward
    fails, or returns a number that is not finite, `say` gets a warning and its figures are NaN. `after` is called with
    the number of responses to each prompt so far. Figures of a rollout with numbers that are not finite are not finite
    either. Raises `FailedScoring` on every rank if the reward failed on any.
    """
    rollouts, rewards = [], dict(golds or {})
    parts: dict[str, list[Tensor]] = {name: [] for name in rewards}
    for number in range(samples):
        rollout = roll_out(collector, prompts, reward, Seeds(EVALUATION_SEED, EVALUATION_STEP + number))
        rollouts.append(rollout)
        for name, gold in rewards.items():
            parts[name].append(_gold_scores(collector, gold, prompts, rollout, f"gold/{name}", say))
        after(number + 1)
    return measure(rollouts, {name: torch.stack(columns, dim=1) for name, columns in parts.items()}, base)


def roll_out(collector: Collector, prompts: PromptBatch, reward: Reward, seeds: Seeds) -> Rollout:
    """Scored responses to the prompts, with the outputs of policy and reference; the same on every rank."""
    runtime = collector.runtime
    with runtime.gathered():
        responses = collector.sample(prompts, seeds)
        terms = score_terms(runtime, responses, reward)
        no_parts = torch.zeros(responses.sequences.responses.shape)
        return collector.forward(prompts, responses, reward.total(terms), no_parts, reward.by_name(terms))


def measure(
    rollouts: Sequence[Rollout],
    golds: Mapping[str, Float[Tensor, "P K"]],
    base: Float[Tensor, "P K"] | None,
) -> Evaluation:
    """The figures of K rollouts on the same P prompts."""
    scores = torch.stack([rollout.scores for rollout in rollouts], dim=1)
    masks = [rollout.sequences.response_mask for rollout in rollouts]
    kls = torch.stack(
        [masked_row_sum(r.logprobs - r.ref_logprobs, mask) for r, mask in zip(rollouts, masks, strict=True)],
        dim=1,
    )
    ids = [
        row[kept].tolist()
        for rollout, mask in zip(rollouts, masks, strict=True)
        for row, kept in zip(rollout.sequences.responses, mask, strict=True)
    ]
    figures: dict[str, float] = {}
    figures["score"], figures["score_ci"] = mean_interval(scores.mean(1))
    figures["score_std"] = float(scores.std(correction=0))
    figures["kl"], figures["kl_ci"] = mean_interval(kls.mean(1))
    figures |= {
        "length": sum(map(len, ids)) / len(ids),
        "eos_fraction": float(torch.stack([rollout.finished for rollout in rollouts]).float().mean()),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "self_repetition": sum(map(self_repetition, ids)) / len(ids),
        "reference_perplexity": perplexity(torch.cat([rollout.ref_logprobs for rollout in rollouts]), torch.cat(masks)),
    }
    if base is not None:
        figures["win_rate"], figures["win_rate_ci"] = mean_interval(wins(scores, base).mean(1))
    for name in rollouts[0].term_scores:
        values = torch.stack([rollout.term_scores[name] for rollout in rollouts], dim=1)
        figures[f"score/{name}"], figures[f"score_ci/{name}"] = mean_interval(values.mean(1))
    for name, values in golds.items():
        figures[f"gold/{name}"], figures[f"gold_ci/{name}"] = mean_interval(values.mean(1))
    return Evaluation(scores=scores, kls=kls, golds=golds, rollout=rollouts[0], figures=figures)


def mean_interval(values: Float[Tensor, " P"]) -> tuple[float, float]:
    """The mean of one number for each prompt, and the half-width of its 95 % interval: 1.96 s / sqrt(P).

    s is their standard deviation, with P - 1 in its denominator. For a single prompt the half-width is NaN, since one
    number has no spread.

    >>> mean, half = mean_interval(torch.tensor([1.0, 3.0, 2.0, 2.0]))
    >>> mean, round(half, 3)  # s = sqrt(2 / 3)
    (2.0, 0.8)
    >>> mean_interval(torch.tensor([5.0]))
    (5.0, nan)
    """
    mean, count = float(values.mean()), len(values)
    return mean, 1.96 * float(values.std()) / math.sqrt(count) if count > 1 else math.nan


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among the n-grams of all responses (Li et al. 2016, distinct-n); NaN if there is none.

    It falls with the number and the length of the responses: compare it only where both are similar.

    >>> distinct([[1, 2, 1], [1, 2]], 1), distinct([[1, 2, 1], [1, 2]], 2)  # 1 2 of five; (1 2) (2 1) of three
    (0.4, 0.6666666666666666)
    >>> distinct([[7], []], 2)
    nan
    """
    grams = [gram for response in responses for gram in _ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_repetition(response: Sequence[int]) -> float:
    """Share of a response's 4-grams that occur earlier in it; 0 for a response that is too short for one.

    >>> self_repetition([1, 2, 3, 1, 2, 3, 1, 2])  # 1231 2312 3123, and 1231 2312 again
    0.4
    >>> self_repetition([1, 2, 3])
    0.0
    """
    grams = _ngrams(response, _REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(response: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(response[start : start + n]) for start in range(len(response) - n + 1)]


def perplexity(logprobs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> float:
    """exp of the mean negative log-probability (nats) over the tokens that count in all rows; NaN if there is none.

    For the reference's log-probabilities, which are at rollout.temperature, it measures how unusual the responses are.

    >>> halves = torch.tensor([[0.5, 0.5], [0.125, 0.9]]).log()
    >>> round(perplexity(halves, torch.tensor([[True, True], [True, False]])), 4)  # (2 x 2 x 8) ** (1/3)
    3.1748
    """
    count = int(mask.sum())
    total = logprobs.double().masked_fill(~mask, 0.0).sum()
    return float(torch.exp(-total / count)) if count else math.nan


def wins(scores: Float[Tensor, "P K"], base: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """1 where a response scores above the base's for the same prompt and random numbers, 0.5 for equal scores, else 0;
    NaN where one of the two is not finite.

    >>> wins(torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([[1.0], [1.0], [1.0]])).flatten().tolist()
    [1.0, 0.5, 0.0]
    """
    won = (scores > base).float() + 0.5 * (scores == base).float()
    return won.masked_fill(~(scores.isfinite() & base.isfinite()), math.nan)


def _gold_scores(
    collector: Collector,
    gold: Reward,
    prompts: PromptBatch,
    rollout: Rollout,
    figure: str,
    say: Callable[[str], None],
) -> Float[Tensor, " P"]:
    """Scores of the responses by a gold reward, which is not trained on; all NaN if it fails on any rank."""
    runtime = collector.runtime
    mine = runtime.share(len(prompts))
    scores, failure = torch.zeros(len(mine)), None
    texts, continuations = ([column[row] for row in mine.tolist()] for column in (rollout.prompts, rollout.texts))
    try:
        scores = gold.finite(texts, continuations, prompts.select(mine).columns)
    except RewardError as error:
        failure = str(error)
    failure = runtime.first_failure(failure)
    if failure is not None:
        say(f"warning: {failure}; {figure} is left empty here; nothing else depends on it")
        return torch.full((len(prompts),), math.nan)
    return runtime.gather_rows(scores, len(prompts))


def compare(base: dict[str, float] | None, trained: Evaluation) -> dict[str, Any]:
    """Figures before and after training, and the gain: the rise of the mean score in standard deviations of the base's.

    A run that was not evaluated at its start has only the figures after.
    """
    comparison: dict[str, Any] = {"base": base or {}, "trained": trained.figures}
    if base is not None and base["score_std"] > 0:
        comparison["gain"] = (trained.figures["score"] - base["score"]) / base["score_std"]
    return comparison


def first_samples(evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    """The first `count` responses and their scores, for `sample_pairs` after training."""
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
