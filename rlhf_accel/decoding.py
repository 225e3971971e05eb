"""The batched sampling loop with a KV cache: token ids in, token ids out.

A response depends on its prompt, the policy and its own row of uniform numbers, not on the batch or the process that it
is sampled in. Knows nothing about tokenization: when a response ends, a callable says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """responses (B, R) int64, R = max_new_tokens, filled up with the pad id; response_mask (B, R), True up to and
    including the stop token; finished (B,), whether a stop ended the response; logprobs (B, R) fp32 in nats of the
    sampled tokens under the policy at that temperature, before top-k and top-p, 0 where masked."""

    responses: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    finished: Bool[Tensor, " B"]
    logprobs: Float[Tensor, "B R"]


def uniforms(seed: int, step: int, index: Sequence[int], length: int) -> Float[Tensor, "B R"]:
    """One number in [0, 1) for every token of every response, from (seed, step, index in the global batch) alone.

    >>> rows = uniforms(0, 1, [0, 1, 2], 4)
    >>> bool((rows[2:] == uniforms(0, 1, [2], 4)).all()), bool((rows[:, :2] == uniforms(0, 1, [0, 1, 2], 2)).all())
    (True, True)
    """
    rows = [np.random.default_rng((seed, step, int(i))).random(length, dtype=np.float32) for i in index]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, length)


@torch.no_grad()
def sample(
    model: Any,
    queries: Int[Tensor, "B Q"],
    query_mask: Bool[Tensor, "B Q"],
    uniform: Float[Tensor, "B R"],
    settings: SamplingSettings,
    *,
    pad_id: int,
    stop_ids: Sequence[int] = (),
    ended: Callable[[Int[Tensor, "B t"]], Bool[Tensor, " B"]],
    everywhere: Callable[[bool], bool] = bool,
) -> Sampled:
    """Sample a response to each query by the inverse CDF of its own uniform numbers.

    `model` is a causal language model of transformers. `stop_ids` are not sampled before min_new_tokens; `ended` says
    of the tokens so far which responses the newest one ended. Stops once all have ended, which `everywhere` may widen
    to the batches of other processes.
    """
    rows, length = uniform.shape
    responses = torch.full((rows, length), pad_id, dtype=torch.int64, device=queries.device)
    logprobs = torch.zeros(rows, length, device=queries.device)
    response_mask = torch.zeros(rows, length, dtype=torch.bool, device=queries.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=queries.device)
    attention_mask = torch.cat([query_mask, torch.ones_like(response_mask)], dim=1).long()
    positions = position_ids(attention_mask)
    width = queries.shape[1]
    tokens, past = queries, None
    newest = torch.tensor([-1], device=queries.device)
    for t in range(length):
        if everywhere(bool(finished.all())):
            break
        seen = width + t
        output = model(
            input_ids=tokens,
            attention_mask=attention_mask[:, :seen],
            past_key_values=past,
            use_cache=True,
            **accepted(model, logits_to_keep=newest, position_ids=positions[:, seen - tokens.shape[1] : seen]),
        )
        past = output.past_key_values
        logits = output.logits[:, -1].float() / settings.temperature
        choice = logits if t >= settings.min_new_tokens else _without(logits, stop_ids)
        tokens = pick(truncate(choice, settings.top_k, settings.top_p), uniform[:, t]).masked_fill(finished, pad_id)[
            :, None
        ]
        active = ~finished
        responses[:, t] = tokens[:, 0]
        response_mask[:, t] = active
        token_logprobs = logits.gather(1, tokens)[:, 0] - logits.logsumexp(1)
        logprobs[:, t] = token_logprobs.masked_fill(finished, 0.0)
        if t + 1 >= settings.min_new_tokens:
            finished |= active & ended(responses[:, : t + 1])
    return Sampled(responses=responses, response_mask=response_mask, finished=finished, logprobs=logprobs)


def pick(logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulated probability first exceeds the row's uniform number.

    >>> pick(torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3), torch.tensor([0.49, 0.51, 0.99])).tolist()
    [0, 1, 2]
    """
    probabilities = logits.float().softmax(-1)
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    # Rounding may bring the product up to the total itself, beyond which no token lies.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Of logits that are not finite comes a token all the same, whose log-probability then is not finite either.
    tokens = torch.searchsorted(cumulated, target, right=True).clamp(max=logits.shape[-1] - 1)
    # A GPU sums in parallel, and its cumulated sums may waver in the last bit where nothing is added. A token without
    # probability that gets such a bit is replaced: it may be a forbidden one.
    return torch.where(probabilities.gather(1, tokens) > 0, tokens, probabilities.argmax(-1, keepdim=True))[:, 0]


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
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def position_ids(mask: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Positions that count real tokens only, so that padding on the left shifts nothing.

    >>> position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
    [[0, 0, 0, 1], [0, 1, 2, 2]]
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def accepted(model: Any, **extras: Any) -> dict[str, Any]:
    """Those of the keywords that the model's forward names: models with ALiBi take no position ids, older ones compute
    all logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    return {name: value for name, value in extras.items() if name in known}


def _without(logits: Float[Tensor, "B V"], ids: Sequence[int]) -> Float[Tensor, "B V"]:
    if not ids:
        return logits
    return logits.index_fill(1, torch.tensor(list(ids), device=logits.device), -torch.inf)
