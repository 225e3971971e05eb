"""Rollout -> Experience: the KL in the reward, advantages and returns, the same on every rank by construction.

An estimator is a pure function `(rewards, rollout, groups, settings) -> (advantages, returns)`. Returns are None for an
estimator without a critic. `groups` (B,) int64 has the number of each response's prompt: responses to one prompt are a
group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.batches import Experience, Rollout
from rlhf_accel.algorithm.kl import kl_estimate
from rlhf_accel.algorithm.masked import masked_row_sum, rescale, standardize, where_counted
from rlhf_accel.config.schema import PPOConfig, RewardConfig

_GRPO_EPS = 1e-4  # added to a group's standard deviation, as in TRL

Estimator = Callable[
    [Float[Tensor, "B R"], Rollout, Int[Tensor, " B"], PPOConfig],
    tuple[Float[Tensor, "B R"], Float[Tensor, "B R"] | None],
]


def make_experience(rollout: Rollout, config: PPOConfig, reward: RewardConfig, kl_coef: float) -> Experience:
    """The experience of a step, from its rollout.

    The score is added to the reward of the last token. The KL penalty is a part of each token's reward (Ziegler et al.
    2019, equation 2), unless it is a term of the loss. Advantages that compare the responses of a group have the scale
    of that group, and are not whitened over the batch.
    """
    mask = rollout.sequences.response_mask
    scores = ppo.penalize_missing_eos(rollout.scores, rollout.finished, reward.missing_eos_penalty)
    in_loss = config.kl_in == "loss"
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)
    rewards = ppo.token_rewards(scores, kl, mask, 0.0 if in_loss else kl_coef)
    scaled = rescale(rewards, mask) if config.whiten_rewards else rewards
    advantages, returns = ESTIMATORS[config.advantage](scaled, rollout, rollout.groups, config)
    if config.whiten_advantages and not config.compares_groups:
        advantages = standardize(advantages, mask)
    return Experience(
        sequences=rollout.sequences,
        old_logprobs=rollout.logprobs,
        ref_logprobs=rollout.ref_logprobs if in_loss else None,
        old_values=rollout.values,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def critic_gae(
    rewards: Float[Tensor, "B R"], rollout: Rollout, groups: Int[Tensor, " B"], settings: PPOConfig
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """`gae` over the critic's values (Schulman et al. 2016).

    Partial scores are the part of the values that the critic need not fit. This equals rewards shaped with them as the
    potential (Ng et al. 1999, "Policy invariance under reward transformations"; Wiewiora 2003).
    """
    assert rollout.values is not None, "this estimator needs a critic"
    mask = rollout.sequences.response_mask
    known = torch.where(mask, rollout.partial_scores, 0.0)
    advantages, returns = gae(rewards, rollout.values + known, mask, settings.gamma, settings.lam)
    return advantages, returns - known


def rloo(
    rewards: Float[Tensor, "B R"], rollout: Rollout, groups: Int[Tensor, " B"], settings: PPOConfig
) -> tuple[Float32[Tensor, "B R"], None]:
    """The return of a response minus the mean return of the other responses to its prompt, on each of its tokens.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, "Back to
    Basics" (arXiv 2402.14740), equation 8. As there, the KL of the whole response is a part of its return.
    """
    mask = rollout.sequences.response_mask
    returns = masked_row_sum(rewards, mask)
    sums, counts = group_sums(returns, groups)
    others = (sums - returns) / (counts - 1).clamp(min=1)  # 0 where there is no other
    return on_each_token(returns - others, mask), None


def dr_grpo(
    rewards: Float[Tensor, "B R"], rollout: Rollout, groups: Int[Tensor, " B"], settings: PPOConfig
) -> tuple[Float32[Tensor, "B R"], None]:
    """The return of a response minus the mean return of its group, itself included, on each of its tokens.

    Source: Liu et al. 2025, "Understanding R1-Zero-like training" (Dr. GRPO, arXiv 2503.20783): no division by the
    group's standard deviation, which weighs prompts by how nearly all their responses score alike.
    """
    mask = rollout.sequences.response_mask
    returns = masked_row_sum(rewards, mask)
    sums, counts = group_sums(returns, groups)
    return on_each_token(returns - sums / counts, mask), None


def grpo(
    rewards: Float[Tensor, "B R"], rollout: Rollout, groups: Int[Tensor, " B"], settings: PPOConfig
) -> tuple[Float32[Tensor, "B R"], None]:
    """`dr_grpo`, divided by the standard deviation of the group's returns (n - 1 in its denominator) plus 1e-4.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), section 4.1.2; the 1e-4 is that of TRL. A group whose
    responses all score alike has advantages of 0.
    """
    mask = rollout.sequences.response_mask
    returns = masked_row_sum(rewards, mask)
    sums, counts = group_sums(returns, groups)
    centred = returns - sums / counts
    squares, _ = group_sums(centred.square(), groups)
    deviation = (squares / (counts - 1).clamp(min=1)).sqrt()
    return on_each_token(centred / (deviation + _GRPO_EPS), mask), None


def reinforce_plus_plus(
    rewards: Float[Tensor, "B R"], rollout: Rollout, groups: Int[Tensor, " B"], settings: PPOConfig
) -> tuple[Float32[Tensor, "B R"], None]:
    """The sum of the discounted rewards from each token on, to be whitened over the batch (`ppo.whiten_advantages`).

    Source: Hu et al. 2025, "REINFORCE++" (arXiv 2501.03262), equations 5 to 8. It is `gae` with values of 0 and a
    lambda of 1.
    """
    mask = rollout.sequences.response_mask
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, settings.gamma, lam=1.0)
    return advantages, None


ESTIMATORS: dict[str, Estimator] = {
    "gae": critic_gae,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "reinforce++": reinforce_plus_plus,
}


def group_sums(values: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
    """For each row, the sum of its group's values and the number of its rows.

    >>> group_sums(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([7, 3, 7]))
    (tensor([3., 5., 3.]), tensor([2, 1, 2]))
    """
    _, place, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(counts)).index_add(0, place, values)
    return sums[place], counts[place]


def flat_groups(scores: Float[Tensor, " B"], groups: Int[Tensor, " B"]) -> Float32[Tensor, ""]:
    """The share of groups whose responses all score alike: an estimator that compares them learns nothing there.

    >>> flat_groups(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    tensor(0.5000)
    """
    _, place = groups.unique(return_inverse=True)
    extremes = [
        scores.new_zeros(int(place.max()) + 1).scatter_reduce(0, place, scores, kind, include_self=False)
        for kind in ("amin", "amax")
    ]
    return (extremes[0] == extremes[1]).float().mean()


def on_each_token(values: Float[Tensor, " B"], mask: Bool[Tensor, "B R"]) -> Float32[Tensor, "B R"]:
    """The value of a response on each of its tokens; 0 where masked out."""
    return where_counted(values[:, None].expand(mask.shape), mask)


def gae(
    rewards: Float[Tensor, "B R"], values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], gamma: float, lam: float
) -> tuple[Float32[Tensor, "B R"], Float32[Tensor, "B R"]]:
    """Generalized advantage estimates and the returns to fit the value to.

    delta[t] = rewards[t] + gamma * values[t + 1] - values[t], and advantages[t] = sum over k of (gamma * lam)^k *
    delta[t + k]. The episode ends with the last token that counts: the value after it is 0, never that of padding.

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

    One response of two tokens and one column of padding, gamma = 1, lam = 0.5. delta[1] = 1 + 0 - 0.5 = 0.5 (the 7 in
    the padding is not a next value), delta[0] = 0 + 0.5 - 0.25 = 0.25; advantages[0] = 0.25 + 0.5 * 0.5 = 0.5:

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
