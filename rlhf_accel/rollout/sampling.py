"""The batched sampling loop with a KV cache: token ids in, token ids out, and what was computed of them on the way.

A response depends on its prompt, the policy and its own row of uniform numbers, not on the batch or the process that it
is sampled in. Knows nothing about tokenization: when a response ends, a callable says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_accel.algorithm.logprobs import entropy_of, log_normalizer, tempered
from rlhf_accel.models.calls import accepted, vocabulary_inputs
from rlhf_accel.models.masks import known_mask
from rlhf_accel.models.positions import first_position, position_ids
from rlhf_accel.system.transfer import to_device, to_host


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Generations:
    """responses (B, R) int64, R = max_new_tokens, filled up with the pad id; response_mask (B, R), True up to and
    including the stop token; finished (B,), whether a stop ended the response; logprobs (B, R) fp32 in nats of the
    sampled tokens under the policy at that temperature, before top-k and top-p; entropy (B, R) fp32 in nats of the
    distribution of which they are; values (B, R) fp32 of the critic, None where it was not asked. These three are 0
    where masked."""

    responses: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]
    finished: Bool[Tensor, " B"]
    logprobs: Float[Tensor, "B R"]
    entropy: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"] | None

    def rows(self, kept: slice) -> Generations:
        """These rows, on the CPU."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        there = {name: tensor[kept] for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **dict(zip(there, to_host(list(there.values())), strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[Generations]) -> Generations:
        """The rows of all parts, in order."""
        columns: dict[str, Any] = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        joined: dict[str, Any] = {
            name: None if column[0] is None else torch.cat(column) for name, column in columns.items()
        }
        return cls(**joined)


def uniforms(seed: int, step: int, index: Sequence[int], length: int) -> Float[Tensor, "B R"]:
    """One number in [0, 1) for every token of every response, from (seed, step, index in the global batch) alone.

    >>> rows = uniforms(0, 1, [0, 1, 2], 4)
    >>> bool((rows[2:] == uniforms(0, 1, [2], 4)).all()), bool((rows[:, :2] == uniforms(0, 1, [0, 1, 2], 2)).all())
    (True, True)
    """
    rows = [np.random.default_rng((seed, step, int(i))).random(length, dtype=np.float32) for i in index]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, length)


# Finished rows leave the batch when so large a share of it is left, since a cache that gets smaller is copied.
_STILL_FULL = 0.75


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
    value: Callable[[Float[Tensor, "n 1 H"]], Float[Tensor, "n 1"]] | None = None,
) -> Generations:
    """Sample a response to each query by the inverse CDF of its own uniform numbers.

    `stop_ids` are not sampled before min_new_tokens; `ended` tells of the tokens so far which responses the newest one
    ended, on their device or, if it had to read them, on the CPU. Stops once all have ended, also in the batches of
    other processes if `everywhere` asks them. `value` maps the states that the vocabulary layer reads to values.

    The host waits for the device once a token: to learn which responses have ended.
    """
    (count, length), device, width = uniform.shape, queries.device, queries.shape[1]
    out = _nothing_yet(count, length, pad_id, device, with_values=value is not None)
    attention_mask = torch.cat([query_mask, torch.ones_like(out.response_mask)], dim=1).long()
    positions = position_ids(attention_mask, first_position(model))
    extras = accepted(model, logits_to_keep=to_device(torch.tensor([-1]), device), position_ids=positions)
    cache = next(iter(accepted(model, past_key_values=None, cache_params=None)), None)  # what the model calls it
    rows = torch.arange(count, device=device)  # of the batch, those that the model still continues
    tokens, past = queries, None
    stops = to_device(torch.tensor(list(stop_ids), dtype=torch.int64), device)
    # The same on the CPU, as far as the host knows.
    padded, kept, finished = attention_mask.cpu(), torch.arange(count), torch.zeros(count, dtype=torch.bool)
    with contextlib.ExitStack() as stack:
        states = stack.enter_context(vocabulary_inputs(model)) if value is not None else []
        for t in range(length):
            if everywhere(bool(finished.all())):
                break
            going = (~finished[kept]).nonzero()[:, 0]
            if past is not None and 0 < len(going) <= _STILL_FULL * len(kept) and _can_select(past):
                kept, going = kept[going], to_device(going, device)
                past.batch_select_indices(going)
                rows, tokens = rows[going], tokens[going]
            seen = width + t
            if "position_ids" in extras:
                extras["position_ids"] = positions[rows, seen - tokens.shape[1] : seen]
            with known_mask(padded[kept, :seen], device):
                output = _forward(model, tokens, attention_mask[rows, :seen], cache, past, extras)
            past = None if cache is None else getattr(output, cache)
            logits = tempered(output.logits[:, -1], settings.temperature)
            probabilities = logits.softmax(-1)
            blocked, active = stops if t < settings.min_new_tokens else stops[:0], ~out.finished[rows]
            picked = _choose(logits, probabilities, uniform[rows, t], settings, blocked)
            tokens = picked.masked_fill(~active, pad_id)[:, None]
            values = None if value is None else value(states.pop()[:, -1:])[:, 0]
            _note_tokens(out, (rows, t), tokens, active, logits, probabilities, values)
            if t + 1 >= settings.min_new_tokens:
                finished = _note_ended(out, finished, ended(out.responses[:, : t + 1]), is_last=t + 1 == length)
            if past is None:  # a model without a cache reads everything again
                tokens = torch.cat([queries, out.responses[:, : t + 1]], dim=1)[rows]
    return out


def _note_tokens(
    out: Generations,
    place: tuple[Int[Tensor, " n"], int],
    tokens: Int[Tensor, "n 1"],
    active: Bool[Tensor, " n"],
    logits: Float[Tensor, "n V"],
    probabilities: Float[Tensor, "n V"],
    values: Float[Tensor, " n"] | None,
) -> None:
    """Note in `out`, at these rows and this column, the tokens and their figures; 0 where a row is not active."""
    normalizer = log_normalizer(logits, probabilities)
    out.logprobs[place] = (logits.gather(1, tokens)[:, 0] - normalizer).masked_fill(~active, 0.0)
    out.entropy[place] = entropy_of(logits, probabilities, normalizer).masked_fill(~active, 0.0)
    if values is not None and out.values is not None:
        out.values[place] = values.masked_fill(~active, 0.0)
    out.responses[place] = tokens[:, 0]
    out.response_mask[place] = active


def _note_ended(
    out: Generations, finished: Bool[Tensor, " B"], ended: Bool[Tensor, " B"], *, is_last: bool
) -> Bool[Tensor, " B"]:
    """Note in `out` which responses have ended, and return it on the CPU, where `finished` was it until now."""
    if ended.device.type == "cpu":
        finished = finished | ended
        out.finished.copy_(to_device(finished, out.finished.device))
        return finished
    out.finished.logical_or_(ended)
    return finished if is_last else out.finished.cpu()  # after the last token nothing depends on it


def _nothing_yet(count: int, length: int, pad_id: int, device: torch.device, *, with_values: bool) -> Generations:
    """Tensors of empty responses, to be filled in place."""
    zeros = torch.zeros(count, length, device=device)
    return Generations(
        responses=torch.full((count, length), pad_id, dtype=torch.int64, device=device),
        response_mask=torch.zeros(count, length, dtype=torch.bool, device=device),
        finished=torch.zeros(count, dtype=torch.bool, device=device),
        logprobs=zeros.clone(),
        entropy=zeros.clone(),
        values=zeros.clone() if with_values else None,
    )


def _choose(
    logits: Float[Tensor, "B V"],
    probabilities: Float[Tensor, "B V"],
    uniform: Float[Tensor, " B"],
    settings: SamplingSettings,
    blocked: Int[Tensor, " n"],
) -> Int[Tensor, " B"]:
    """The next token of each row, none of which is `blocked`; `probabilities` are the softmax of the logits."""
    choice = truncate(_without(logits, blocked), settings.top_k, settings.top_p)
    return pick(probabilities if choice is logits else choice.softmax(-1), uniform)


def _forward(model: Any, tokens: Tensor, mask: Tensor, cache: str | None, past: Any, extras: dict[str, Any]) -> Any:
    """The model's output for the next tokens, continuing `past`, which it takes by the name `cache`."""
    # Of a text that has begun, a state space reads no mask: the state has it, and the new tokens all count.
    masked = past is None or cache != "cache_params"
    named = {} if cache is None else {cache: past}
    return model(input_ids=tokens, attention_mask=mask if masked else None, use_cache=True, **named, **extras)


def pick(probabilities: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulated probability first exceeds the row's uniform number.

    >>> pick(torch.tensor([[0.5, 0.25, 0.25]]).expand(3, 3), torch.tensor([0.49, 0.51, 0.99])).tolist()
    [0, 1, 2]
    """
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    # Rounding may bring the product up to the total itself, beyond which no token lies.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Of probabilities that are not finite comes a token all the same, whose log-probability then is not finite either.
    tokens = torch.searchsorted(cumulated, target, right=True).clamp(max=probabilities.shape[-1] - 1)
    # A GPU sums in parallel, and its cumulated sums may waver in the last bit where nothing is added. A token without
    # probability that gets such a bit is replaced: it may be a forbidden one.
    possible = probabilities.gather(1, tokens) > 0
    if tokens.device.type != "cpu" or not possible.all():  # a GPU replaces none sooner than it tells whether there are
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
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def _can_select(cache: Any) -> bool:
    """Whether rows of a cache can be selected: not where layers have a state beside keys and values."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _without(logits: Float[Tensor, "B V"], ids: Int[Tensor, " n"]) -> Float[Tensor, "B V"]:
    return logits.index_fill(1, ids, -torch.inf) if len(ids) else logits
