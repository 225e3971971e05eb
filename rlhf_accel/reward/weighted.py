"""The reward of a run: a weighted sum of named terms, retried, calibrated and clipped.

Knows how scores are summed; knows neither where the terms come from nor what they compute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_accel.reward.calls import RewardError, RewardFunction, call, check_finite
from rlhf_accel.reward.classifier import Classifier
from rlhf_accel.system.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Weighted sum of named terms, then shifted, scaled and clipped: the score in the objective."""

    terms: tuple[tuple[str, float, RewardFunction], ...]  # name (such as reward.model=PATH), weight, function
    mean: float = 0.0
    std: float = 1.0
    clip: float | None = None
    retries: int = 0
    retry_wait: float = 1.0  # seconds, doubled after each retry
    timeout: float | None = None  # seconds

    @property
    def classifiers(self) -> tuple[tuple[str, float, Classifier], ...]:
        """The terms that are classifiers, with their names and weights."""
        return tuple((name, weight, term) for name, weight, term in self.terms if isinstance(term, Classifier))

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Float[Tensor, " B"]:
        """Scores (B,) in fp32 on the CPU. They may be infinite or nan: the caller checks.

        Raises `RewardError`, which names the term that failed after `retries` retries.
        """
        return self.total(self.term_scores(prompts, responses, columns))

    def term_scores(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Float[Tensor, "B T"]:
        """Scores (B, T) of the T terms on their own scales, in fp64; see `__call__`."""
        parts = [self._retried(name, term, prompts, responses, columns) for name, _, term in self.terms]
        return torch.stack(parts, dim=1)

    def total(self, term_scores: Float[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """The scores (B,) in fp32: the weighted sum, shifted, scaled and clipped."""
        parts = term_scores.unbind(1)
        total = sum(weight * part for (_, weight, _), part in zip(self.terms, parts, strict=True))
        scores = ((torch.as_tensor(total) - self.mean) / self.std).float()
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def by_name(self, term_scores: Float[Tensor, "B T"]) -> dict[str, Float[Tensor, " B"]]:
        """The scores of each term in fp32 by the name of its metric, see `term_names`; none of a single term, whose
        score is the total."""
        if len(self.terms) == 1:
            return {}
        names = term_names([name for name, _, _ in self.terms])
        return dict(zip(names, term_scores.float().unbind(1), strict=True))

    def finite(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Float[Tensor, " B"]:
        """The same scores; raises `RewardError` also for a score that is not finite."""
        parts = []
        for name, _, term in self.terms:
            parts.append(self._retried(name, term, prompts, responses, columns))
            check_finite(name, parts[-1], responses)
        return self.total(torch.stack(parts, dim=1))

    def try_out(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Float[Tensor, " B"]:
        """`finite` without retries."""
        return replace(self, retries=0).finite(prompts, responses, columns)

    def calibrated(self, scores: Float[Tensor, " N"]) -> Reward:
        """The reward under which samples of the reference have mean 0, variance 1 (Ziegler et al. 2019, section 2.1).

        `scores` are the scores of these samples by this reward. Raises `ConfigError` if they are not finite, or equal.
        """
        if not scores.isfinite().all():
            raise ConfigError(
                "reward.calibrate=true, but not all scores of the reference samples are finite", key="reward.calibrate"
            )
        std, mean = torch.std_mean(scores.double() * self.std + self.mean)
        if not std > 1e-8:
            raise ConfigError(
                f"reward.calibrate=true, but all {len(scores)} reference samples score {mean:.4g}; the reward "
                "cannot tell them apart",
                key="reward.calibrate",
            )
        return replace(self, mean=float(mean), std=float(std))

    def _retried(
        self,
        name: str,
        function: RewardFunction,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Float[Tensor, " B"]:
        retries = 0 if isinstance(function, Classifier) else self.retries  # a classifier would fail in the same way
        for attempt in range(retries):
            try:
                return call(name, function, prompts, responses, columns, self.timeout)
            except RewardError as error:
                wait = self.retry_wait * 2**attempt
                logger.warning("%s; trying again in %g s (%d of %d)", error, wait, attempt + 1, retries)
                time.sleep(wait)
        return call(name, function, prompts, responses, columns, self.timeout)


def term_names(terms: Sequence[str]) -> tuple[str, ...]:
    """The names of a reward's terms in metrics: `model`, `url`, or the name of the function, with its module if another
    term has the same name.

    >>> term_names(["reward.model=org/judge", "reward.function=rlhf_accel.rewards:last_number"])
    ('model', 'last_number')
    >>> term_names(["reward.model=org/judge", "reward.function=mine:model", "reward.function=his:model"])
    ('model', 'mine:model', 'his:model')
    """
    parts = [name.removeprefix("reward.").partition("=") for name in terms]
    paths = [value if key == "function" else key for key, _, value in parts]
    short = [path.rpartition(":")[2] for path in paths]
    return tuple(path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True))
