"""The next token from logits: temperature, truncation, and the inverse CDF of a uniform number. Pure: torch only.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_accel.algorithm.logprobs import entropy_of, log_normalizer, tempered


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Drawn(NamedTuple):
    """Tokens (n,) int64; their log-probabilities and the entropy of the distribution, (n,) fp32 in nats, before top-k
    and top-p and whatever is blocked."""

    tokens: Int[Tensor, " n"]
    logprobs: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]


def draw(
    logits: Float[Tensor, "n V"],
    uniform: Float[Tensor, " n"],
    settings: SamplingSettings,
    blocked: Int[Tensor, " k"],
) -> Drawn:
    """The next token of each row, none of which is `blocked`, by the row's uniform number."""
    logits = tempered(logits, settings.temperature)
    probabilities = logits.softmax(-1)
    choice = truncate(_without(logits, blocked), settings.top_k, settings.top_p)
    tokens = pick(probabilities if choice is logits else choice.softmax(-1), uniform)
    normalizer = log_normalizer(logits, probabilities)
    return Drawn(
        tokens=tokens,
        logprobs=logits.gather(1, tokens[:, None])[:, 0] - normalizer,
        entropy=entropy_of(logits, probabilities, normalizer),
    )


def pick(probabilities: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulated probability first exceeds the row's uniform number.

    >>> pick(torch.tensor([[0.5, 0.25, 0.25]]).expand(3, 3), torch.tensor([0.49, 0.51, 0.99])).tolist()
    [0, 1, 2]
    """
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    # Rounding may bring the product up to the total itself, beyond which no token lies.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Probabilities that are not finite give some token all the same; its log-probability is not finite either.
    tokens = torch.searchsorted(cumulated, target, right=True).clamp(max=probabilities.shape[-1] - 1)
    # A GPU sums in parallel, and its cumulated sums may differ in the last bit where nothing is added. A token that is
    # picked by such a bit alone has no probability and may be a blocked one: the likeliest token replaces it.
    possible = probabilities.gather(1, tokens) > 0
    if tokens.device.type != "cpu" or not possible.all():  # on a GPU, asking would take longer
        tokens = torch.where(possible, tokens, probabilities.argmax(-1, keepdim=True))
    return tokens[:, 0]


def truncate(logits: Float[Tensor, "B V"], top_k: int, top_p: float) -> Float[Tensor, "B V"]:
    """Logits with -inf outside the top_k likeliest tokens (0 keeps all) and outside the smallest set of likeliest
    tokens that holds the probability top_p (Holtzman et al. 2020); the likeliest token always stays.

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0, 0.6).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def _without(logits: Float[Tensor, "B V"], ids: Int[Tensor, " n"]) -> Float[Tensor, "B V"]:
    return logits.index_fill(1, ids, -torch.inf) if len(ids) else logits
