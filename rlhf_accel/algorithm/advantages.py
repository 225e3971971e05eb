"""Rollout -> Experience: the KL in the reward, advantages and returns, the same on every rank by construction.

An estimator is a pure function `(rewards, rollout, groups, settings) -> (advantages, returns)`; returns are None of one
that needs no critic. `groups` (B,) int64 numbers the prompt of each response.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.batches import Experience, Rollout
from rlhf_accel.algorithm.kl import kl_estimate
from rlhf_accel.algorithm.masked import rescale, standardize, where_counted
from rlhf_accel.config.schema import PPOConfig, RewardConfig

Estimator = Callable[
    [Float[Tensor, "B R"], Rollout, Int[Tensor, " B"], PPOConfig],
    tuple[Float[Tensor, "B R"], Float[Tensor, "B R"] | None],
]


def make_experience(
    rollout: Rollout, config: PPOConfig, reward: RewardConfig, kl_coef: float, estimator: str = "gae"
) -> Experience:
    """What the update is trained on.

    The KL penalty goes into the per-token rewards (Ziegler et al. 2019, equation 2) and the score onto the last token.
    """
    mask = rollout.sequences.response_mask
    scores = ppo.penalize_missing_eos(rollout.scores, rollout.finished, reward.missing_eos_penalty)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)
    rewards = ppo.token_rewards(scores, kl, mask, kl_coef)
    scaled = rescale(rewards, mask) if config.whiten_rewards else rewards
    advantages, returns = ESTIMATORS[estimator](scaled, rollout, rollout.groups, config)
    if config.whiten_advantages:
        advantages = standardize(advantages, mask)
    return Experience(
        sequences=rollout.sequences,
        old_logprobs=rollout.logprobs,
        old_values=rollout.values,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def critic_gae(
    rewards: Float[Tensor, "B R"], rollout: Rollout, groups: Int[Tensor, " B"], settings: PPOConfig
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """`gae` over the critic's values (Schulman et al. 2016).

    Partial scores are the part of the values that the critic need not fit: this equals rewards shaped by them as a
    potential (Ng et al. 1999, "Policy invariance under reward transformations"; Wiewiora 2003).
    """
    assert rollout.values is not None, "this estimator needs a critic"
    mask = rollout.sequences.response_mask
    known = torch.where(mask, rollout.partial_scores, 0.0)
    advantages, returns = gae(rewards, rollout.values + known, mask, settings.gamma, settings.lam)
    return advantages, returns - known


ESTIMATORS: dict[str, Estimator] = {"gae": critic_gae}
CRITIC_FREE: frozenset[str] = frozenset()  # those of which no critic is built, trained or saved


def gae(
    rewards: Float[Tensor, "B R"], values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], gamma: float, lam: float
) -> tuple[Float32[Tensor, "B R"], Float32[Tensor, "B R"]]:
    """Generalized advantage estimates and the returns to fit the value to.

    delta[t] = rewards[t] + gamma * values[t + 1] - values[t], and advantages[t] = sum over k of (gamma * lam)^k *
    delta[t + k]. The episode ends with the last token that counts: the value after it is 0, never that of a padding.

    Args:
        rewards: (B, R), in the unit of the reward.
        values: (B, R), same unit; `values[:, t]` is the value of the state in which token t is chosen.
        mask: (B, R) bool, each row True from position 0 up to its last token and False after it.
        gamma: discount per token, in [0, 1].
        lam: lambda, in [0, 1]; 1 is the return-to-go minus the value, 0 the one-step temporal difference.

    Returns:
        `(advantages, returns)`, each (B, R) fp32, 0 where masked out, without gradient; returns = advantages + values.

    Raises:
        ValueError: `gamma` or `lam` is outside [0, 1], the shapes differ, or a row of `mask` is not contiguous from 0.

    Source: Schulman et al. 2016 (GAE), eq. 16; the returns: OpenAI's baselines, `ppo2`.

    One response of two tokens and a padding, gamma = 1, lam = 0.5. delta[1] = 1 + 0 - 0.5 = 0.5 (the 7 in the padding
    is not a next value), delta[0] = 0 + 0.5 - 0.25 = 0.25; advantages[0] = 0.25 + 0.5 * 0.5 = 0.5:

    >>> rewards, values = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.25, 0.5, 7.0]])
    >>> gae(rewards, values, torch.tensor([[True, True, False]]), gamma=1.0, lam=0.5)
    (tensor([[0.5000, 0.5000, 0.0000]]), tensor([[0.7500, 1.0000, 0.0000]]))
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma={gamma} and lam={lam} must both lie in [0, 1]")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("gae needs right-padded responses: a row of the mask turns from False to True")
    rewards = where_counted(rewards.detach(), mask)
    values = where_counted(values.detach(), mask)

    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(deltas.shape[0])
    for t in reversed(range(deltas.shape[1])):  # padding is on the right and its deltas are 0, so running stays 0 there
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values
