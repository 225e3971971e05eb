"""The maths of PPO from human feedback: tensors and floats in, tensors out.

Token rewards and the clipped losses. This module knows no model, tokenizer, config, rank or file, and imports torch
only (and jaxtyping, for signatures).

Shapes: `B` rollouts, `Q` query tokens, `R` response tokens, `L` = Q + R, `V` vocabulary.

Three rules hold for every function here:

- *Masks* are boolean, and True means "counts". What lies under False never reaches a result or a gradient, not even
  NaN: values are selected with `torch.where`, for `NaN * 0` is NaN.
- *fp32 inside.* Every input is cast with `.float()` before any arithmetic and every result is fp32, because bf16 keeps
  8 bits: at a logprob of -5 its step is 0.03, as large as the per-token KL and the `ratio - 1` that PPO works with.
- *Inputs are never written to.*
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlhf_accel.algorithm.kl import k3, require_positive
from rlhf_accel.algorithm.masked import largest, masked_sum, mean_and_variance, where_counted


def penalize_missing_eos(
    scores: Float[Tensor, " B"], finished: Bool[Tensor, " B"], penalty: float
) -> Float32[Tensor, " B"]:
    """Subtract `penalty` from the score of each response that ran out of tokens before it stopped.

    Args:
        scores: (B,), in the unit of the reward.
        finished: (B,) bool, True where the response holds its stop token.
        penalty: not negative, in the same unit.

    Returns:
        (B,) fp32.

    Raises:
        ValueError: `penalty` is negative or NaN, which would reward endless responses.

    Source: Huang et al. 2024, "N+ Implementation Details", the EOS trick (there the score is replaced; here it is
    lowered, so that a better unfinished response still beats a worse one).
    """
    if not penalty >= 0:
        raise ValueError(f"penalty={penalty} for a missing stop token must not be negative; it is subtracted")
    scores = scores.float()  # classifiers run in half precision
    return scores - where_counted(torch.full_like(scores, penalty), ~finished)


def token_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], kl_coef: float
) -> Float32[Tensor, "B R"]:
    """Reward of each token: minus the KL penalty on every token that counts, plus the score on the last one.

    Args:
        scores: (B,), one per response, in the unit of the reward.
        kl: (B, R) nats per token, of the sampled tokens (`kl_estimate`).
        mask: (B, R) bool; the last True of a row is its last token.
        kl_coef: reward per nat (beta in the paper).

    Returns:
        (B, R) fp32, 0 where masked out. A row with no True entry receives nothing: its score is dropped.

    Raises:
        ValueError: the shapes differ.

    Source: Ziegler et al. 2019, sec. 2, eq. 2, as spread over tokens by its code.

    The first response has two tokens and the second three. The score lands on the last token that counts, beside that
    token's own penalty, and not on the last column:

    >>> scores = torch.tensor([1.0, 2.0])
    >>> kl = torch.tensor([[0.5, 1.0, 9.0], [0.5, 0.0, 1.0]])
    >>> mask = torch.tensor([[True, True, False], [True, True, True]])
    >>> token_rewards(scores, kl, mask, kl_coef=0.5)
    tensor([[-0.2500,  0.5000,  0.0000],
            [-0.2500,  0.0000,  1.5000]])
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)}, mask of {tuple(mask.shape)}; expected a score per row"
        )
    # Counted from the right, the last True of a row is the one where the running count of True is 1.
    is_last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    return -kl_coef * where_counted(kl, mask) + where_counted(scores.unsqueeze(1).expand(mask.shape), is_last)


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy loss of a micro-batch and its statistics; all 0-dim fp32, only `loss` carries a gradient.

    Sums and counts add up over micro-batches and ranks, and the maxima combine by a maximum, for which an empty
    micro-batch holds the identity, 0. The counts are fp32 too, so that one reduction can carry all fields.
    """

    loss: Float32[Tensor, ""]
    """Sum over the tokens that count of max(-A * ratio, -A * clip(ratio)); in units of the advantage times tokens."""
    clipped: Float32[Tensor, ""]
    """Number of tokens whose clipped branch is strictly the greater, which is to say those without gradient."""
    approx_kl: Float32[Tensor, ""]
    """Sum of the k3 estimate of KL(old || current), (ratio - 1) - log ratio; nats."""
    ratio_max: Float32[Tensor, ""]
    """Largest ratio; 0 if no token counts."""
    ratio_error: Float32[Tensor, ""]
    """Largest |ratio - 1|; 0 if no token counts. Before the first update of a batch it must be 0, up to rounding."""
    log_ratio_error: Float32[Tensor, ""]
    """Largest |log ratio|, nats; 0 if no token counts. Unlike the one above it has no bound where the ratio falls."""


@dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss of a micro-batch; 0-dim fp32 sums that add up, only `loss` carries a gradient."""

    loss: Float32[Tensor, ""]
    """Sum over the tokens that count of half the squared error, the greater of the plain and the clipped one."""
    clipped: Float32[Tensor, ""]
    """Number of tokens whose clipped error is strictly the greater."""


def policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    cliprange: float,
) -> PolicyLoss:
    """PPO's clipped surrogate, negated to be minimized and summed over tokens.

    A sum, not a mean: the caller divides by the number of tokens that count in the whole minibatch, over all ranks and
    micro-batches. So the gradient is the same however the minibatch is split, while a mean of micro-batch means would
    weigh a token by how few others happened to share its micro-batch.

    Args:
        logprobs: (B, R) nats, of the current policy; the only input that receives a gradient.
        old_logprobs: (B, R) nats, of the policy that sampled.
        advantages: (B, R), in the unit of the reward, or without one once standardized.
        mask: (B, R) bool.
        cliprange: epsilon, positive: the ratio is clipped to [1 - cliprange, 1 + cliprange].

    Returns:
        `PolicyLoss`. An all-False mask gives zeros, with a backward.

    Raises:
        ValueError: `cliprange` is not positive, or the shapes differ.

    Source: Schulman et al. 2017 (PPO), eq. 7; `approx_kl`: J. Schulman 2020, "Approximating KL Divergence".

    A token of advantage 1 whose probability grew by half, at cliprange 0.2: max(-1.5, -1.2) = -1.2, the clipped branch.

    >>> old, new = torch.tensor([[0.4]]).log(), torch.tensor([[0.6]]).log()
    >>> result = policy_loss(new, old, torch.tensor([[1.0]]), torch.tensor([[True]]), cliprange=0.2)
    >>> round(result.loss.item(), 4), result.clipped.item()
    (-1.2, 1.0)
    """
    require_positive("cliprange", cliprange)
    # Masked before exp, not after: exp of a padding's garbage may be inf, whose zeroed gradient is 0 * inf = NaN.
    log_ratio = where_counted(logprobs, mask) - where_counted(old_logprobs.detach(), mask)
    advantages = where_counted(advantages.detach(), mask)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_sum(torch.maximum(plain, clipped), mask)

    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    return PolicyLoss(
        loss=loss,
        clipped=masked_sum((clipped > plain).float(), mask),
        approx_kl=masked_sum(k3(log_ratio), mask),
        ratio_max=largest(ratio, mask),
        ratio_error=largest((ratio - 1).abs(), mask),
        log_ratio_error=largest(log_ratio.abs(), mask),
    )


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    cliprange_value: float | None,
) -> ValueLoss:
    """Half the squared error of the value, clipped around the rollout's value and summed over tokens.

    A sum, not a mean, for the reason given in `policy_loss`.

    Args:
        values: (B, R), in the unit of the reward, of the current critic; the only input that receives a gradient.
        old_values: (B, R), same unit, of the critic at rollout time.
        returns: (B, R), same unit (`gae`).
        mask: (B, R) bool.
        cliprange_value: positive, same unit: how far a value is believed to move in one batch; None for no clipping.

    Returns:
        `ValueLoss`: the loss is the sum of 0.5 * max((v - ret)^2, (clip(v, old +- cliprange_value) - ret)^2), in
        squared units of the reward times tokens. An all-False mask gives zeros, with a backward.

    Raises:
        ValueError: `cliprange_value` is not positive, or the shapes differ.

    Source: Schulman et al. 2017 (PPO), eq. 9, L^VF; the clipping is from OpenAI's baselines `ppo2` and Ziegler et al.
    2019's code, see Huang et al. 2024, "N+ Implementation Details". The factor 0.5 is theirs too.
    """
    values = where_counted(values, mask)
    old_values = where_counted(old_values.detach(), mask)
    returns = where_counted(returns.detach(), mask)
    plain = (values - returns).square()
    if cliprange_value is None:
        return ValueLoss(loss=0.5 * masked_sum(plain, mask), clipped=plain.new_zeros(()))
    require_positive("cliprange_value", cliprange_value)
    # Clamped between two tensors rather than old + clamp(v - old), which rounds, and so would count ties as clipped.
    near_old = torch.clamp(values, min=old_values - cliprange_value, max=old_values + cliprange_value)
    clipped = (near_old - returns).square()
    return ValueLoss(
        loss=0.5 * masked_sum(torch.maximum(plain, clipped), mask),
        clipped=masked_sum((clipped > plain).float(), mask),
    )


def explained_variance(
    values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float32[Tensor, ""]:
    """Share of the returns' variance that the values predict: 1 - Var(returns - values) / Var(returns).

    Args:
        values, returns: (B, R), in the unit of the reward.
        mask: (B, R) bool.

    Returns:
        0-dim fp32 without unit or gradient: 1 is perfect, 0 no better than a constant, below 0 worse than one. It is 0
        if the returns do not vary (constant, one token or none), as there is nothing to explain.

    Raises:
        ValueError: the shapes differ.
    """
    values, returns = where_counted(values.detach(), mask), where_counted(returns.detach(), mask)
    _, unexplained = mean_and_variance(returns - values, mask)
    _, total = mean_and_variance(returns, mask)
    return torch.where(total > 0, 1 - unexplained / total, 0.0)
