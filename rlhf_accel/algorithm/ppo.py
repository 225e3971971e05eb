"""The maths of PPO from human feedback: tensors and floats in, tensors out.

It knows token logprobs, masked sums, KL estimators, rewards, advantages, the clipped losses and the KL controllers. It
refuses to know models, tokenizers, configs, ranks and files, and imports torch only (and jaxtyping, for signatures).

Shapes: `B` rollouts, `Q` query tokens, `R` response tokens, `L` = Q + R, `V` vocabulary.

Three rules hold for every function here:

- *Masks* are boolean, and True means "counts". What lies under False never reaches a result or a gradient, not even
  NaN: values are selected with `torch.where`, for `NaN * 0` is NaN.
- *fp32 inside.* Every input is cast with `.float()` before any arithmetic and every result is fp32, because bf16 keeps
  8 bits: at a logprob of -5 its step is 0.03, as large as the per-token KL and the `ratio - 1` that PPO works with.
- *Inputs are never written to.*
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

# Stands in for a logit of -inf where it is multiplied by its probability of 0, for 0 * -inf is NaN.
_LOWEST = torch.finfo(torch.float32).min


# ---------------------------------------------------------------------------------------------------------------------
# Token logprobs
# ---------------------------------------------------------------------------------------------------------------------


def token_logprobs(
    logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"], temperature: float = 1.0
) -> Float32[Tensor, "B R"]:
    """Log-probability of each token under softmax(logits / temperature).

    A logit of -inf is a token that cannot be sampled; its logprob is -inf. Forward and backward make one (B, R, V)
    tensor each at most: with a vocabulary of 50 000 that is where the time and the memory of a small model go.

    Args:
        logits: (B, R, V), any float dtype; `logits[:, t]` predicts `tokens[:, t]` (the caller shifts).
        tokens: (B, R) int64 in [0, V), padding included.
        temperature: the one the tokens were sampled with, so that the ratio is that of the sampling distribution.

    Returns:
        (B, R) fp32, nats, differentiable in `logits`.

    Raises:
        ValueError: `temperature` is not positive.

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", for dividing by the temperature.
    """
    logprobs: Tensor = _TokenLogprobs.apply(tempered(logits, temperature), tokens)  # type: ignore[no-untyped-call]  # torch's
    return logprobs


def log_normalizer(logits: Float32[Tensor, "*B V"], probabilities: Float32[Tensor, "*B V"]) -> Float32[Tensor, "*B"]:
    """logsumexp(logits) in nats, read off their softmax where that is there already: the likeliest token's logit less
    its log-probability.

    >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
    >>> torch.allclose(log_normalizer(logits, logits.softmax(-1)), logits.logsumexp(-1))
    True
    """
    return logits.float().amax(dim=-1) - probabilities.float().amax(dim=-1).log()


class _TokenLogprobs(torch.autograd.Function):
    """`logits[token] - logsumexp(logits)`, whose gradient is `onehot(token) - softmax(logits)`.

    Autograd would make four (B, R, V) tensors for it. Here the softmax, in which torch takes the maximum, the
    exponentials and their sum row by row, is the only one: the normalizer is read off it, and it becomes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        probabilities = logits.softmax(dim=-1)
        ctx.save_for_backward(probabilities, tokens)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_normalizer(logits, probabilities)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probabilities, tokens = ctx.saved_tensors  # nobody else has them; a second backward pass would raise
        grad = grad.unsqueeze(-1)
        result = probabilities.mul_(-grad)
        return result.scatter_add_(-1, tokens.unsqueeze(-1), grad), None


def entropy_of(
    logits: Float32[Tensor, "*B V"], probabilities: Float32[Tensor, "*B V"], normalizer: Float32[Tensor, "*B"]
) -> Float32[Tensor, "*B"]:
    """Entropy in nats of a softmax that is there already, with its `log_normalizer`; not for gradients.

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    >>> entropy_of(logits, logits.softmax(-1), logits.logsumexp(-1)).exp()
    tensor([2.])
    """
    return normalizer.float() - (probabilities.float() * logits.float().clamp(min=_LOWEST)).sum(-1)


def token_entropy(logits: Float[Tensor, "B R V"], temperature: float = 1.0) -> Float32[Tensor, "B R"]:
    """Entropy of softmax(logits / temperature), the distribution that each token is drawn from.

    A token with logit -inf adds nothing (p log p -> 0 as p -> 0) and receives no gradient. It costs several passes over
    (B, R, V), so it is asked for only where it is used.

    Args:
        logits, temperature: as in `token_logprobs`.

    Returns:
        (B, R) fp32, nats in [0, log V], differentiable in `logits`.

    Raises:
        ValueError: `temperature` is not positive.

    Source: Schulman et al. 2017 (PPO), eq. 9, the entropy bonus S.
    """
    logprobs = tempered(logits, temperature).log_softmax(dim=-1).clamp(min=_LOWEST)
    with torch.autocast(logits.device.type, enabled=False):  # it would take the dot product in half precision
        dots: Tensor = torch.linalg.vecdot(logprobs.exp(), logprobs)
    return -dots


def tempered(logits: Float[Tensor, "*B V"], temperature: float) -> Float32[Tensor, "*B V"]:
    """The logits of the distribution at that temperature, fp32. Raises `ValueError` if it is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; greedy decoding has no logprobs to learn from")
    logits = logits.float()  # a sum over 50 000 exponentials in half precision loses the KL we are after
    return logits if temperature == 1.0 else logits / temperature  # 1.0 is the usual case: spare a (B, R, V) copy


# ---------------------------------------------------------------------------------------------------------------------
# Masked sums
# ---------------------------------------------------------------------------------------------------------------------


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float32[Tensor, ""]:
    """Sum of `x` where `mask` is True.

    Args:
        x: any shape, any float dtype; any unit, which the result keeps.
        mask: bool of the same shape.

    Returns:
        0-dim fp32; 0 for an all-False mask, still attached to the graph, so that an empty micro-batch has a backward.

    Raises:
        ValueError: the shapes differ.
    """
    return _select(x, mask).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float32[Tensor, ""]:
    """Mean of `x` where `mask` is True: a statistic of a whole batch, not a loss that is split (see `policy_loss`).

    Args:
        x: any shape, any float dtype; any unit, which the result keeps.
        mask: bool of the same shape.

    Returns:
        0-dim fp32.

    Raises:
        ValueError: the shapes differ, or `mask` is all False: a mean of nothing has no value, and 0 would be a lie.
    """
    total = masked_sum(x, mask)
    count = mask.sum()
    if count == 0:
        raise ValueError(f"masked_mean: the mask of shape {tuple(mask.shape)} has no True entry; expected at least 1")
    return total / count


def masked_row_sum(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float32[Tensor, " B"]:
    """Sum of `x` over each row's tokens where `mask` is True, as in the KL of a whole response.

    Args:
        x: (B, R), any float dtype; any unit, which the result keeps (nats per token become nats per response).
        mask: (B, R) bool.

    Returns:
        (B,) fp32; 0 for a row without a True entry.

    Raises:
        ValueError: the shapes differ.
    """
    return _select(x, mask).sum(dim=1)


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in fp32 where `mask` is True and 0 elsewhere, in value and in gradient, whatever `x` holds there."""
    if x.shape != mask.shape:
        # Without this, a (B, 1) or (R,) tensor would broadcast against the mask and be counted many times.
        raise ValueError(f"a tensor of shape {tuple(x.shape)} meets a mask of {tuple(mask.shape)}; expected the same")
    return torch.where(mask, x.float(), 0.0)  # fp32: sums run over thousands of tokens


def _largest(x: Tensor, mask: Tensor) -> Tensor:
    """Largest of the non-negative `x` where `mask` is True; 0, the identity of such a maximum, if there is none."""
    return torch.cat((x.new_zeros(1), _select(x, mask).flatten())).amax()


def _mean_and_variance(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance where `mask` is True: (0, 0) if it never is, and exactly 0 variance for a constant."""
    count = mask.sum().clamp(min=1)
    mean = masked_sum(x, mask) / count
    # A mean is rounded, so a constant x would seem to vary by an ulp; the mean of what is left mends that.
    mean = mean + masked_sum(x.float() - mean, mask) / count
    return mean, masked_sum((x.float() - mean).square(), mask) / count


# ---------------------------------------------------------------------------------------------------------------------
# KL and rewards
# ---------------------------------------------------------------------------------------------------------------------


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
        (B, R) fp32, nats per token. There is no mask here: what padding gives is for the caller to mask.

    Raises:
        ValueError: `estimator` is none of the three, or the shapes differ.

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
        return _k3(-logr)
    raise ValueError(f"KL estimator {estimator!r} is unknown; choose one of 'k1', 'k2', 'k3'")


def _k3(logr: Tensor) -> Tensor:
    """exp(logr) - 1 - logr, by expm1: exp(logr) - 1 would round a small logr away, and come out negative."""
    return torch.expm1(logr) - logr


def standardize(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], eps: float = 1e-8) -> Float32[Tensor, "B R"]:
    """Shift and scale to mean 0 and variance 1 over the entries where `mask` is True.

    The mean and the variance are those of all rows together, so pass the whole batch, never one rank's share. The
    variance is the biased one (divided by n, not n - 1), as in OpenAI's code, which keeps n = 1 finite.

    Args:
        x: (B, R), any unit; typically advantages.
        mask: (B, R) bool.
        eps: added to the variance before the root, in the squared unit of `x`.

    Returns:
        (B, R) fp32 without unit, 0 where masked out. One entry, equal entries or none give 0 everywhere.

    Raises:
        ValueError: the shapes differ.

    Source: Huang et al. 2024, "N+ Implementation Details", whitening; Ziegler et al. 2019's code, `whiten`.

    >>> standardize(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    x = _select(x, mask)  # before the product, in whose gradient a padding's NaN would reach all entries
    mean, variance = _mean_and_variance(x, mask)
    return _select((x - mean) * (variance + eps).rsqrt(), mask)


def rescale(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], eps: float = 1e-8) -> Float32[Tensor, "B R"]:
    """Divide by the standard deviation over the entries where `mask` is True; nothing is shifted.

    Signs and zeros survive, and so does the ranking of responses by their sum, which a shift per token would tilt
    towards long or short ones. (OpenAI's `whiten(shift_mean=False)` differs: it scales the deviations and adds the old
    mean back, which moves the zeros.) The variance is that of all rows together, biased, as in `standardize`.

    Args:
        x: (B, R), any unit; typically rewards.
        mask: (B, R) bool.
        eps: a variance up to this is taken for rounding noise, in the squared unit of `x`.

    Returns:
        (B, R) fp32, 0 where masked out. If the variance is at most `eps` (one entry, or all equal) there is no scale to
        divide by, and `x` is returned unscaled rather than blown up by eps**-0.5.

    Raises:
        ValueError: the shapes differ.

    >>> rescale(torch.tensor([[1.0, 5.0, 99.0]]), torch.tensor([[True, True, False]]))  # mean 3, standard deviation 2
    tensor([[0.5000, 2.5000, 0.0000]])
    """
    x = _select(x, mask)  # before the product, in whose gradient a padding's NaN would reach all entries
    _, variance = _mean_and_variance(x, mask)
    return x * torch.where(variance > eps, variance + eps, 1.0).rsqrt()


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
    return scores - _select(torch.full_like(scores, penalty), ~finished)


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
    return -kl_coef * _select(kl, mask) + _select(scores.unsqueeze(1).expand(mask.shape), is_last)


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
    rewards = _select(rewards.detach(), mask)
    values = _select(values.detach(), mask)

    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(deltas.shape[0])
    for t in reversed(range(deltas.shape[1])):  # padding is on the right and its deltas are 0, so running stays 0 there
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


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
    _require_positive("cliprange", cliprange)
    # Masked before exp, not after: exp of a padding's garbage may be inf, whose zeroed gradient is 0 * inf = NaN.
    log_ratio = _select(logprobs, mask) - _select(old_logprobs.detach(), mask)
    advantages = _select(advantages.detach(), mask)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_sum(torch.maximum(plain, clipped), mask)

    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    return PolicyLoss(
        loss=loss,
        clipped=masked_sum((clipped > plain).float(), mask),
        approx_kl=masked_sum(_k3(log_ratio), mask),
        ratio_max=_largest(ratio, mask),
        ratio_error=_largest((ratio - 1).abs(), mask),
        log_ratio_error=_largest(log_ratio.abs(), mask),
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
    values = _select(values, mask)
    old_values = _select(old_values.detach(), mask)
    returns = _select(returns.detach(), mask)
    plain = (values - returns).square()
    if cliprange_value is None:
        return ValueLoss(loss=0.5 * masked_sum(plain, mask), clipped=plain.new_zeros(()))
    _require_positive("cliprange_value", cliprange_value)
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
    values, returns = _select(values.detach(), mask), _select(returns.detach(), mask)
    _, unexplained = _mean_and_variance(returns - values, mask)
    _, total = _mean_and_variance(returns, mask)
    return torch.where(total > 0, 1 - unexplained / total, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# KL controllers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedKLController:
    """A KL coefficient that stays what it is.

    Raises:
        ValueError: `coef` is negative or not finite.
    """

    coef: float
    """Reward per nat of KL."""

    def __post_init__(self) -> None:
        if not 0 <= self.coef < math.inf:
            raise ValueError(f"coef={self.coef} of the KL penalty must be finite and not negative")

    def updated(self, kl: float, num_samples: int) -> "FixedKLController":
        """The controller for the next step, which is this one.

        Raises:
            ValueError: `kl` is not finite; a run that has diverged should not go on for want of anyone looking.
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
            _require_positive(name, getattr(self, name))

    def updated(self, kl: float, num_samples: int) -> "AdaptiveKLController":
        """The controller for the next step.

        Args:
            kl: nats per response, the mean over the whole global batch (on one rank's share, ranks would part ways).
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


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be positive and finite")


def _require_measured(kl: float, num_samples: int) -> None:
    if not math.isfinite(kl):
        raise ValueError(f"kl={kl} is not finite: the policy or the reference gave a logprob that is NaN or infinite")
    if num_samples < 0:
        raise ValueError(f"num_samples={num_samples} must not be negative")
