"""The KL divergence between policy and reference: estimators by token, and controllers of its coefficient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"], estimator: KLEstimator
) -> Float32[Tensor, "B R"]:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With logr = logprobs - ref_logprobs:

    - `k1` = logr: unbiased, high variance, often negative. Summed over a response it is the penalty of Ziegler et al.
    - `k2` = logr^2 / 2: never negative, low variance, biased; the bias vanishes as the two distributions meet.
    - `k3` = exp(-logr) - 1 + logr: never negative, unbiased if the policy can sample all that the reference can; low
      variance near the reference, and far from it a high one, for exp(-logr) has no bound.

    In the reward only `k1` is right. There a policy follows E[c grad log pi] for an estimator c, which is the gradient
    of the KL for k1 alone: for k3 it is grad KL(policy || reference) - grad KL(reference || policy), and for k2 it
    lowers whatever token has a large |logr|, also where the policy is below the reference (arXiv 2512.21852).

    Args:
        logprobs: (B, R) nats, of the policy the tokens were sampled from.
        ref_logprobs: (B, R) nats, of the reference, for the same tokens.
        estimator: "k1", "k2" or "k3".

    Returns:
        (B, R) fp32, nats per token. There is no mask here: the caller masks padding.

    Raises:
        ValueError: `estimator` is not one of the three, or the shapes differ.

    Source: J. Schulman 2020, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html).

    >>> import math
    >>> policy, reference = torch.tensor([[0.8]]).log(), torch.tensor([[0.4]]).log()  # logr = log 2 = 0.6931
    >>> [round(kl_estimate(policy, reference, name).item(), 4) for name in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"logprobs of shape {tuple(logprobs.shape)}, ref_logprobs of {tuple(ref_logprobs.shape)}; expected the same"
        )
    logr = logprobs.float() - ref_logprobs.float()  # fp32 before the difference: it is small and its terms are not
    if estimator == "k1":
        return logr
    if estimator == "k2":
        return logr.square() / 2
    if estimator == "k3":
        return k3(-logr)
    raise ValueError(f"KL estimator {estimator!r} is unknown; choose one of 'k1', 'k2', 'k3'")


def k3(logr: Tensor) -> Tensor:
    """exp(logr) - 1 - logr, by expm1: exp(logr) - 1 would round a small logr away, and come out negative."""
    return torch.expm1(logr) - logr


@dataclass(frozen=True)
class FixedKLController:
    """A constant KL coefficient.

    Raises:
        ValueError: `coef` is negative or not finite.
    """

    coef: float
    """Reward per nat of KL."""

    def __post_init__(self) -> None:
        if not 0 <= self.coef < math.inf:
            raise ValueError(f"coef={self.coef} of the KL penalty must be finite and not negative")

    def updated(self, kl: float, num_samples: int) -> FixedKLController:
        """The controller for the next step, which is this one.

        Raises:
            ValueError: `kl` is not finite; a run that has diverged must not continue unnoticed.
        """
        _require_measured(kl, num_samples)
        return self


@dataclass(frozen=True)
class AdaptiveKLController:
    """A KL coefficient that steers the KL per response towards a target, by a proportional rule in log space.

    error = clip(kl / target - 1, -0.2, 0.2), and the next coefficient is coef * (1 + error * num_samples / horizon).

    Raises:
        ValueError: `coef`, `target` or `horizon` is not positive and finite (a coefficient of 0 could never rise).

    Source: Ziegler et al. 2019, sec. 2.2; `horizon` is from its code: num_samples / horizon is the paper's K_beta.

    One batch of 512 at twice the target: the error 1 is clipped to 0.2, so the factor is 1 + 0.2 * 512 / 10240 = 1.01.

    >>> AdaptiveKLController(coef=0.2, target=6.0, horizon=10240).updated(kl=12.0, num_samples=512).coef
    0.202
    """

    coef: float
    """Reward per nat of KL."""
    target: float
    """KL to hold, nats per response."""
    horizon: float
    """Rollouts over which the coefficient answers an error; must exceed a fifth of `num_samples`."""

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon"):
            require_positive(name, getattr(self, name))

    def updated(self, kl: float, num_samples: int) -> AdaptiveKLController:
        """The controller for the next step.

        Args:
            kl: nats per response, the mean over the whole global batch: with one rank's share, ranks would diverge.
            num_samples: rollouts in that batch.

        Raises:
            ValueError: `kl` is not finite, `num_samples` is negative, or so large beside `horizon` that a low KL would
                turn the coefficient to 0 or below. The last does not depend on `kl`, so it shows in the first step.
        """
        _require_measured(kl, num_samples)
        if 0.2 * num_samples >= self.horizon:
            raise ValueError(
                f"horizon={self.horizon} is too short for num_samples={num_samples}: a low KL would make the "
                f"coefficient 0 or negative; choose a horizon above {0.2 * num_samples}"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * num_samples / self.horizon))


def require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be positive and finite")


def _require_measured(kl: float, num_samples: int) -> None:
    if not math.isfinite(kl):
        raise ValueError(f"kl={kl} is not finite: the policy or the reference gave a logprob that is NaN or infinite")
    if num_samples < 0:
        raise ValueError(f"num_samples={num_samples} must not be negative")
