"""The maths of PPO from human feedback: tensors and floats in, tensors out.

Token rewards and the clipped losses. This module knows no model, tokenizer, config, rank or file, and imports torch
only (and jaxtyping, for signatures).

Shapes: `B` rollouts, `Q` query tokens, `R` response tokens, `L` = Q + R, `V` vocabulary.

Three rules hold for every function here:

- *Masks* are boolean, and True means "counts". What lies under False never reaches a result or a gradient, not even
  NaN: values are selected with `torch.where`, for `NaN * 0` is NaN.
- *fp32 inside.* Every input is cast with `.float()` before any arithmetic and every result is fp32, because bf16 keeps
  8 bits: at a logprob of -5 its step is 0.03, as large as the per-token KL and the `ratio - 1` that PPO uses.
- *Inputs are never written to.*
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlhf_accel.algorithm.kl import k3, require_positive
from rlhf_accel.algorithm.masked import largest, masked_sum, mean_and_variance, weighted_sum, where_counted


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
    """The policy loss of a micro-batch and its statistics; all 0-dim fp32, only `loss` carries a gradient.

    Sums and counts add up over micro-batches and ranks, and the maxima combine by a maximum, for which an empty
    micro-batch holds the identity, 0. The counts are fp32 too, so that one reduction can carry all fields.
    """

    loss: Float32[Tensor, ""]
    """Sum over the tokens that count of the form's loss; in units of the advantage times tokens."""
    clipped: Float32[Tensor, ""]
    """Number of tokens whose clipped branch is strictly the greater; of `cispo`, those whose weight is cut."""
    approx_kl: Float32[Tensor, ""]
    """Sum of the k3 estimate of KL(old || current), (ratio - 1) - log ratio; nats."""
    ratio_max: Float32[Tensor, ""]
    """Largest ratio; 0 if no token counts."""
    ratio_error: Float32[Tensor, ""]
    """Largest |ratio - 1|; 0 if no token counts. Before the first update of a batch it must be 0, up to rounding."""
    log_ratio_error: Float32[Tensor, ""]
    """Largest |log ratio|, nats; 0 if no token counts. Unlike the one above it has no bound where the ratio falls."""


@dataclass(frozen=True)
class Clip:
    """How far a ratio may lead: within [1 - low, 1 + high], and with `dual` at most `dual` times a negative advantage.

    Raises `ValueError` for a range that is not positive, or a `dual` that is not above 1.
    """

    low: float
    high: float
    dual: float | None = None

    def __post_init__(self) -> None:
        require_positive("cliprange", self.low)
        require_positive("cliprange_high", self.high)
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"dual_clip={self.dual} must be above 1")


def policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    clip: Clip,
    form: str = "clip",
    weights: Float[Tensor, " B"] | None = None,
) -> PolicyLoss:
    """The policy gradient's surrogate, negated to be minimized and summed over tokens.

    A sum, not a mean: the caller divides by the number of tokens that count in the whole minibatch, over all ranks and
    micro-batches. So the gradient is the same however the minibatch is split, while a mean of micro-batch means would
    weigh a token by how few others happened to share its micro-batch.

    Args:
        logprobs: (B, R) nats, of the current policy; the only input that receives a gradient.
        old_logprobs: (B, R) nats, of the policy that sampled.
        advantages: (B, R), in the unit of the reward, or without one once standardized.
        mask: (B, R) bool.
        clip: the range of the ratio.
        form: a key of `SURROGATES`.
        weights: (B,), of each row's tokens in the sum of the loss; None is 1.

    Returns:
        `PolicyLoss`. An all-False mask gives zeros, with a backward.

    Raises:
        ValueError: the shapes differ.

    Source: Schulman et al. 2017 (PPO), eq. 7; `approx_kl`: J. Schulman 2020, "Approximating KL Divergence".

    A token of advantage 1 whose probability grew by half, at cliprange 0.2: max(-1.5, -1.2) = -1.2, the clipped branch.

    >>> old, new = torch.tensor([[0.4]]).log(), torch.tensor([[0.6]]).log()
    >>> result = policy_loss(new, old, torch.tensor([[1.0]]), torch.tensor([[True]]), Clip(0.2, 0.2))
    >>> round(result.loss.item(), 4), result.clipped.item()
    (-1.2, 1.0)
    """
    # Masked before exp, not after: exp of a padding's garbage may be inf, whose zeroed gradient is 0 * inf = NaN.
    logprobs = where_counted(logprobs, mask)
    log_ratio = logprobs - where_counted(old_logprobs.detach(), mask)
    advantages = where_counted(advantages.detach(), mask)
    losses, clipped = SURROGATES[form](log_ratio, logprobs, advantages, mask, clip)
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    return PolicyLoss(
        loss=weighted_sum(losses, mask, weights),
        clipped=masked_sum(clipped.float(), mask),
        approx_kl=masked_sum(k3(log_ratio), mask),
        ratio_max=largest(ratio, mask),
        ratio_error=largest((ratio - 1).abs(), mask),
        log_ratio_error=largest(log_ratio.abs(), mask),
    )


def clipped_surrogate(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip
) -> tuple[Tensor, Tensor]:
    """PPO's: per token the greater of -A ratio and -A clip(ratio), and where that is strictly the latter.

    A higher upper bound lets unlikely tokens grow (DAPO's clip-higher; Yu et al. 2025, arXiv 2503.14476, eq. 10). The
    dual clip bounds the loss where A < 0 and the ratio has become large (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    """
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip.low, 1 + clip.high)
    losses, clipped = torch.maximum(plain, bounded), bounded > plain
    if clip.dual is None:
        return losses, clipped
    limit = -advantages * clip.dual
    beyond = (advantages < 0) & (losses > limit)
    return torch.where(beyond, limit, losses), clipped | beyond


def cispo_surrogate(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip
) -> tuple[Tensor, Tensor]:
    """-A logprob, weighted by the ratio, which is cut at 1 + `clip.high` and carries no gradient: every token keeps its
    own gradient.

    Source: MiniMax 2025, "MiniMax-M1" (CISPO, arXiv 2506.13585), equations 4 and 5; as there, no lower bound.
    """
    ratio = log_ratio.detach().exp()
    return -advantages * ratio.clamp(max=1 + clip.high) * logprobs, ratio > 1 + clip.high


def sequence_surrogate(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: Clip
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of a response's ratio, the geometric mean of its tokens' ratios, on each of its tokens.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization" (GSPO, arXiv 2507.18071), equations 5 and 7, which
    it equals under `sequence` reduction.
    """
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    mean = (log_ratio.sum(1, keepdim=True) / lengths).expand(mask.shape)
    return clipped_surrogate(mean, logprobs, advantages, mask, clip)


SURROGATES = {"clip": clipped_surrogate, "cispo": cispo_surrogate, "gspo": sequence_surrogate}


def row_weights(mask: Bool[Tensor, "B R"], reduction: str) -> Float32[Tensor, " B"] | None:
    """Weights of each response's tokens in the sum of a loss; None is 1.

    `token` and `constant` count each token once, and differ in the divisor of the sum (`denominator`); `sequence`
    counts each response once, whatever its length.
    """
    return 1.0 / mask.sum(1).clamp(min=1).float() if reduction == "sequence" else None


def denominator(mask: Bool[Tensor, "B R"], reduction: str) -> int:
    """What the loss of a whole minibatch is divided by: its tokens, its responses, or responses times R.

    Source: of `constant`, Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783): a divisor that does not depend on the lengths.

    >>> mask = torch.tensor([[True, True, False], [True, False, False]])
    >>> [denominator(mask, reduction) for reduction in ("token", "sequence", "constant")]
    [3, 2, 6]
    """
    return {"token": int(mask.sum()), "sequence": len(mask), "constant": mask.numel()}[reduction]


@dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss of a micro-batch; 0-dim fp32 sums that add up, only `loss` carries a gradient."""

    loss: Float32[Tensor, ""]
    """Sum over the tokens that count of half the squared error, the greater of the plain and the clipped one."""
    clipped: Float32[Tensor, ""]
    """Number of tokens whose clipped error is strictly the greater."""


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    cliprange_value: float | None,
    weights: Float[Tensor, " B"] | None = None,
) -> ValueLoss:
    """Half the squared error of the value, clipped around the rollout's value and summed over tokens.

    A sum, not a mean, for the reason given in `policy_loss`.

    Args:
        values: (B, R), in the unit of the reward, of the current critic; the only input that receives a gradient.
        old_values: (B, R), same unit, of the critic at rollout time.
        returns: (B, R), same unit (`gae`).
        mask: (B, R) bool.
        cliprange_value: positive, same unit: how far a value is believed to move in one batch; None for no clipping.
        weights: (B,), of each row's tokens in the sum of the loss; None is 1.

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
        return ValueLoss(loss=0.5 * weighted_sum(plain, mask, weights), clipped=plain.new_zeros(()))
    require_positive("cliprange_value", cliprange_value)
    # Clamped between two tensors rather than old + clamp(v - old), which rounds, and so would count ties as clipped.
    near_old = torch.clamp(values, min=old_values - cliprange_value, max=old_values + cliprange_value)
    clipped = (near_old - returns).square()
    return ValueLoss(
        loss=0.5 * weighted_sum(torch.maximum(plain, clipped), mask, weights),
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
