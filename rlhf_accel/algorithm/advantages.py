"""Rollout -> Experience: the KL in the reward, advantages and returns, the same on every rank by construction."""

from __future__ import annotations

import torch

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.batches import Experience, Rollout
from rlhf_accel.config.schema import PPOConfig, RewardConfig


def make_experience(rollout: Rollout, config: PPOConfig, reward: RewardConfig, kl_coef: float) -> Experience:
    """What the update learns from.

    The KL penalty goes into the per-token rewards (Ziegler et al. 2019, equation 2) and the score onto the last token.
    Partial scores are the part of the values that the critic need not learn: this equals rewards shaped by them as a
    potential (Ng et al. 1999, "Policy invariance under reward transformations"; Wiewiora 2003).
    """
    mask = rollout.sequences.response_mask
    scores = ppo.penalize_missing_eos(rollout.scores, rollout.finished, reward.missing_eos_penalty)
    kl = ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)
    rewards = ppo.token_rewards(scores, kl, mask, kl_coef)
    learned = ppo.rescale(rewards, mask) if config.whiten_rewards else rewards
    known = torch.where(mask, rollout.partial_scores, 0.0)
    advantages, returns = ppo.gae(learned, rollout.values + known, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = ppo.standardize(advantages, mask)
    return Experience(
        sequences=rollout.sequences,
        old_logprobs=rollout.logprobs,
        old_values=rollout.values,
        rewards=rewards,
        advantages=advantages,
        returns=returns - known,
    )
