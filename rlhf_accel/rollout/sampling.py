"""The batched sampling loop with a KV cache: token ids in, token ids out, and what was computed of them on the way.

A response depends on its prompt, the policy and its own row of uniform numbers, not on the batch or the process that it
is sampled in. Knows nothing about tokenization: when a response ends, a callable says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_accel.models.calls import accepted, vocabulary_inputs
from rlhf_accel.models.masks import known_mask
from rlhf_accel.models.positions import first_position, position_ids
from rlhf_accel.models.static_cache import cannot_be_fixed, has_plain_layers
from rlhf_accel.rollout.decoding import Sampled, StaticForm, decode
from rlhf_accel.rollout.drawing import SamplingSettings, draw
from rlhf_accel.rollout.generations import Generations
from rlhf_accel.system.transfer import to_device


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
    static: StaticForm | None = None,
) -> Generations:
    """Sample a response to each query by the inverse CDF of its own uniform numbers.

    `stop_ids` are not sampled before min_new_tokens; `ended` tells of the tokens so far which responses the newest one
    ended, on their device or, if it had to read them, on the CPU. Stops once all have ended, also in the batches of
    other processes if `everywhere` asks them. `value` maps the states that the vocabulary layer reads to values.
    With `static`, tokens after the first are sampled in the static form (decoding.py), if the model allows it; then
    `everywhere` is not asked.

    The host waits for the device once a token: to learn which responses have ended.
    """
    with contextlib.ExitStack() as stack:
        task = Sampled(
            model=model,
            query_mask=query_mask,
            uniform=uniform,
            settings=settings,
            pad_id=pad_id,
            stops=to_device(torch.tensor(list(stop_ids), dtype=torch.int64), queries.device),
            ended=ended,
            value=value,
            states=stack.enter_context(vocabulary_inputs(model)) if value is not None else [],
        )
        return _sample(task, queries, everywhere, static)


def _sample(
    task: Sampled, queries: Int[Tensor, "B Q"], everywhere: Callable[[bool], bool], static: StaticForm | None
) -> Generations:
    model, settings = task.model, task.settings
    (count, length), device, width = task.uniform.shape, queries.device, queries.shape[1]
    out = Generations.empty(count, length, task.pad_id, device, with_values=task.value is not None)
    attention_mask = torch.cat([task.query_mask, torch.ones_like(out.response_mask)], dim=1).long()
    positions = position_ids(attention_mask, first_position(model))
    extras = accepted(model, logits_to_keep=to_device(torch.tensor([-1]), device), position_ids=positions)
    cache = next(iter(accepted(model, past_key_values=None, cache_params=None)), None)  # what the model calls it
    rows = torch.arange(count, device=device)  # of the batch, those that the model still continues
    tokens, past = queries, None
    # The same on the CPU, as far as the host knows.
    padded, kept, finished = attention_mask.cpu(), torch.arange(count), torch.zeros(count, dtype=torch.bool)
    for t in range(length):
        if everywhere(bool(finished.all())):
            break
        if t == 1 and static is not None and _can_be_static(model, past, static):
            decode(task, out, past, finished, static)
            break
        going = (~finished[kept]).nonzero()[:, 0]
        if past is not None and 0 < len(going) <= _STILL_FULL * len(kept) and has_plain_layers(past):
            kept, going = kept[going], to_device(going, device)
            past.batch_select_indices(going)
            rows, tokens = rows[going], tokens[going]
        seen = width + t
        if "position_ids" in extras:
            extras["position_ids"] = positions[rows, seen - tokens.shape[1] : seen]
        with known_mask(padded[kept, :seen], device):
            output = _forward(model, tokens, attention_mask[rows, :seen], cache, past, extras)
        past = None if cache is None else getattr(output, cache)
        active = ~out.finished[rows]
        picked, logprobs, entropy = draw(output.logits[:, -1], task.uniform[rows, t], settings, task.blocked(t))
        tokens = picked.masked_fill(~active, task.pad_id)[:, None]
        out.logprobs[rows, t] = logprobs.masked_fill(~active, 0.0)
        out.entropy[rows, t] = entropy.masked_fill(~active, 0.0)
        if task.value is not None and out.values is not None:
            out.values[rows, t] = task.value(task.states.pop()[:, -1:])[:, 0].masked_fill(~active, 0.0)
        out.responses[rows, t], out.response_mask[rows, t] = tokens[:, 0], active
        if t + 1 >= settings.min_new_tokens:
            finished = _note_ended(out, finished, task.ended(out.responses[:, : t + 1]), is_last=t + 1 == length)
        if past is None:  # a model without a cache reads everything again
            tokens = torch.cat([queries, out.responses[:, : t + 1]], dim=1)[rows]
    return out


def _can_be_static(model: Any, past: Any, static: StaticForm) -> bool:
    reason = static.refused or cannot_be_fixed(model, past)
    if reason is not None:
        static.refuse(reason)
    return reason is None


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


def _forward(model: Any, tokens: Tensor, mask: Tensor, cache: str | None, past: Any, extras: dict[str, Any]) -> Any:
    """The model's output for the next tokens, continuing `past`, which it takes by the name `cache`."""
    # Of a text that has begun, a state space reads no mask: the state has it, and the new tokens all count.
    masked = past is None or cache != "cache_params"
    named = {} if cache is None else {cache: past}
    return model(input_ids=tokens, attention_mask=mask if masked else None, use_cache=True, **named, **extras)
