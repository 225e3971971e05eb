"""Log-probabilities and entropy of tokens from logits, in fp32 whatever the dtype of the logits.

Shapes: B rollouts, R response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

# Stands in for a logit of -inf where it is multiplied by its probability of 0, for 0 * -inf is NaN.
_LOWEST = torch.finfo(torch.float32).min


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
    """logsumexp(logits) in nats from a softmax that was already computed: the likeliest token's logit minus its
    log-probability.

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
    """Entropy in nats from a softmax that was already computed and its `log_normalizer`; not for gradients.

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
