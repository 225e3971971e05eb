"""The probes padded = alone and sampled = recomputed: whether a model of any family computes, in a batch that is padded
and token by token, what plain transformers computes of each text alone.

Knows models and token ids; knows no config, no rank and no file. Every function costs a few passes over a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.algorithm.logprobs import token_logprobs
from rlhf_accel.models.calls import model_inputs, response_hidden, response_logits
from rlhf_accel.models.policy_with_value import PolicyWithValue
from rlhf_accel.models.probes import Finding, rounding_limit
from rlhf_accel.rollout.decoding import StaticForm
from rlhf_accel.rollout.drawing import SamplingSettings
from rlhf_accel.rollout.sampling import sample, uniforms
from rlhf_accel.system.errors import in_one_line

_PROMPTS, _RESPONSE = (2, 6), 3  # tokens of the made-up batch; each pass has to read all weights
_STATIC_RESPONSE = 4  # the first token, one that warms up, and two of a captured graph
_ADVICE = "; choose another model"
_SEEN = 2  # tokens of a response that a pass of a text alone reads


def problem(look: Callable[[], Finding]) -> str | None:
    """The message of a probe that failed, or why it could not run; None if it passed."""
    try:
        found = look()
    except Exception as error:  # models are many, and fail on these inputs in different ways
        return cannot_run(error)
    return None if found.passed else found.message


def cannot_run(error: Exception) -> str:
    return f"this model cannot be run as a decoder of text ({in_one_line(error)}){_ADVICE}"


def made_up(ids: Tensor, pad_id: int) -> Sequences:
    """A batch made of these token ids, repeated if few: left-padded prompts of different lengths, with responses."""
    length, width = _PROMPTS[-1] + _RESPONSE, _PROMPTS[-1]
    text = ids.repeat(-(-(length + len(_PROMPTS)) // len(ids)))
    queries = torch.full((len(_PROMPTS), width), pad_id)
    query_mask = torch.zeros(queries.shape, dtype=torch.bool)
    for row, count in enumerate(_PROMPTS):
        queries[row, width - count :], query_mask[row, width - count :] = text[:count], True
    responses = torch.stack([text[width + row :][:_RESPONSE] for row in range(len(_PROMPTS))])
    return Sequences(
        queries=queries,
        query_mask=query_mask,
        responses=responses,
        response_mask=torch.ones(responses.shape, dtype=torch.bool),
    )


@torch.no_grad()
def policy_alone(policy: Any, batch: Sequences, dtype: torch.dtype) -> Finding:
    """Whether the padded text of a batch has the log-probabilities that plain transformers gives it alone, without
    mask and positions. `dtype` is that of the computation.

    Alone, only its beginning is read: later tokens must not change a log-probability either.
    """
    logits, _ = response_logits(policy, *model_inputs(batch))
    ids, start = _alone(batch)
    plain = policy(input_ids=ids[None], use_cache=False).logits[:, start - 1 : -1]
    theirs = token_logprobs(plain, ids[None, start:])[0]
    differences = [_apart(token_logprobs(logits, batch.responses)[0, :_SEEN], theirs)]
    reason = "padding on the left reaches what it computes"
    found = _of_rows("padded = alone", differences, rounding_limit(logits, dtype) / 4, "nats")
    if not found.passed:
        reason = _reason(policy, batch, found.limit) or reason
    return _explained(found, f"{_family(policy)}: log-probabilities in a padded batch and alone", reason)


@torch.no_grad()
def critic_alone(module: PolicyWithValue, batch: Sequences, dtype: torch.dtype) -> Finding:
    """As `policy_alone`, for the states that the head of a critic reads, if these are not the policy's."""
    with module.critic_trunk() as trunk:
        states = response_hidden(trunk, *model_inputs(batch)).float()
        ids, start = _alone(batch)
        theirs = trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0, start - 1 : -1].float()
        sizes = theirs.norm(dim=-1).nan_to_num(1.0).clamp(min=1e-6)
        differences = [_apart(states[0, :_SEEN], theirs).norm(dim=-1) / sizes]
        what = f"{_family(trunk)}: the critic's states in a padded batch and alone"
    limit = rounding_limit(torch.ones(1, device=states.device), dtype)
    found = _of_rows("padded = alone", differences, limit, "of their size")
    return _explained(found, what, "padding or positions reach what it computes")


@torch.no_grad()
def sampled_is_recomputed(
    policy: Any,
    batch: Sequences,
    pad_id: int,
    dtype: torch.dtype,
    *,
    static: StaticForm | None = None,
    room: int = 0,
) -> Finding:
    """Whether tokens sampled one by one, by whatever cache the model has, get the log-probabilities of one pass.

    In the static form, a cache has `room` for so many tokens of a response, which may matter to how it is read.
    """
    count, device = len(batch), batch.queries.device
    length = _RESPONSE if static is None else _STATIC_RESPONSE
    room = max(room, length)
    sampled = sample(
        policy,
        batch.queries,
        batch.query_mask,
        uniforms(0, 0, range(count), room).to(device),
        SamplingSettings(max_new_tokens=room),
        pad_id=pad_id,
        ended=lambda tokens: torch.full((len(tokens),), tokens.shape[1] == length, device=tokens.device),
        static=static,
    )
    responses, mask = sampled.responses[:, :length], sampled.response_mask[:, :length]
    logits, _ = response_logits(policy, batch.queries, batch.query_mask, responses, mask)
    differences = list(_apart(token_logprobs(logits, responses), sampled.logprobs[:, :length]))
    found = _of_rows("sampled = recomputed", differences, rounding_limit(logits, dtype) / 4, "nats")
    what = f"{_family(policy)}: log-probabilities of sampled tokens and of the same in one pass"
    return _explained(found, what, "its cache does not continue a text as a pass reads it")


def static_problem(
    policy: Any, batch: Sequences, pad_id: int, dtype: torch.dtype, form: StaticForm, longest: int
) -> str | None:
    """Why this model is not to be sampled in the static form, with a cache for samples of `longest` tokens; None if the
    tokens get the log-probabilities of one pass."""
    room = longest - batch.queries.shape[1]
    try:
        found = sampled_is_recomputed(policy, batch, pad_id, dtype, static=form, room=room)
    except Exception as error:  # models are many, and most are not written for such a cache
        return in_one_line(error)
    return form.refused if found.passed else found.message.removesuffix(_ADVICE)


def _alone(batch: Sequences) -> tuple[Tensor, int]:
    """The first text without padding, as far as `_SEEN` tokens of its response, and where that starts."""
    mask = batch.query_mask[0]
    return torch.cat([batch.queries[0][mask], batch.responses[0, :_SEEN]]), int(mask.sum())


def _reason(policy: Any, batch: Sequences, limit: float) -> str | None:
    """The property of a decoder that the model lacks even for texts without padding; None if it has them all."""
    last = batch.select(torch.tensor([len(batch) - 1]))
    beginning = replace(last, responses=last.responses[:, :_SEEN], response_mask=last.response_mask[:, :_SEEN])
    whole, cut = (
        token_logprobs(response_logits(policy, *model_inputs(text))[0], text.responses) for text in (last, beginning)
    )
    if not float((whole[:, :_SEEN] - cut).abs().mean()) <= limit:
        return "what follows a token changes its log-probability: not a causal decoder (is_decoder in its config?)"
    ids = torch.cat([last.queries, last.responses], dim=1)
    plain = policy(input_ids=ids, use_cache=False).logits[:, last.queries.shape[1] - 1 : -1]
    if not float((whole - token_logprobs(plain, last.responses)).abs().mean()) <= limit:
        return "it counts positions in another way"
    return None


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """The difference, 0 where neither is finite: an overflow is not due to padding, and is reported elsewhere."""
    return torch.where(one.isfinite() | other.isfinite(), one - other, 0.0)


def _of_rows(probe: str, differences: Sequence[Tensor], limit: float, unit: str) -> Finding:
    """The largest mean difference of a row: rounding affects single tokens, padding whole rows."""
    means = [float(row.abs().double().mean()) for row in differences]
    worst = max(means, key=lambda mean: torch.inf if mean != mean else mean)
    return Finding(probe=probe, difference=worst, limit=limit, unit=unit, message="")


def _explained(found: Finding, what: str, reason: str) -> Finding:
    figures = f"{what} differ by {found.difference:.2g} {found.unit}".rstrip() + f" (limit {found.limit:.2g})"
    return replace(found, message=figures if found.passed else f"{figures}: {reason}{_ADVICE}")


def _family(model: Any) -> str:
    return str(model.config.model_type)
