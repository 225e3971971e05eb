"""The static form of the sampling loop: each token's step has the same shapes and works in place, so that a GPU can
replay it as a CUDA graph.

What it samples is what the loop in sampling.py samples. The host learns of each token while the next one is computed:
it finds the ends of responses then, and what was computed beyond them is cleared in the end.

Shapes: B responses, n of them still continued, Q query, R response, W = Q + R - 1 columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_accel.models.calls import accepted
from rlhf_accel.models.positions import first_position, position_ids
from rlhf_accel.models.static_cache import fixed
from rlhf_accel.rollout.drawing import SamplingSettings, draw
from rlhf_accel.rollout.generations import Generations
from rlhf_accel.system.graphs import runs
from rlhf_accel.system.terminal import say
from rlhf_accel.system.transfer import to_device, to_host, to_host_later

# Finished rows leave at multiples of so many tokens, if at most this share of the rows is left. Fewer rows need a new
# graph, which costs about as much as a few tokens without one, and they save little on a GPU: most of a token's time is
# reading the weights.
LEAVE_EVERY, LEAVE_AT = 32, 0.5


@dataclass(kw_only=True)
class StaticForm:
    """Whether a process samples in the static form, and what it has learned of it, each of which is logged once.

    graphs: whether steps are captured as CUDA graphs. refused: why the model cannot be sampled so, None if it can as
    far as is known.
    """

    graphs: bool
    log: Callable[[str], None] = say
    refused: str | None = None

    def refuse(self, reason: str) -> None:
        if self.refused is None:
            self.refused = reason
            self.log(f"sampling without a static cache: {reason}")

    def without_graphs(self, reason: str) -> None:
        self.graphs = False
        self.log(f"sampling without CUDA graphs: none could be captured ({reason})")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What both forms of the loop share: the model with the critic's head, the prompts, and how they are continued."""

    model: Any
    query_mask: Bool[Tensor, "B Q"]
    uniform: Float[Tensor, "B R"]
    settings: SamplingSettings
    pad_id: int
    stops: Int[Tensor, " k"]
    ended: Callable[[Int[Tensor, "B t"]], Bool[Tensor, " B"]]
    value: Callable[[Float[Tensor, "n 1 H"]], Float[Tensor, "n 1"]] | None
    states: list[Tensor]  # to which each pass appends what the vocabulary layer reads

    def blocked(self, t: int) -> Int[Tensor, " k"]:
        """The tokens that response token t must not be."""
        return self.stops if t < self.settings.min_new_tokens else self.stops[:0]


class TokenStep:
    """Computes one token of each row. A call changes tensors in place, and nothing on the host: `tokens` are those that
    it reads and then those that it drew, `t` is the place of the latter in the response."""

    def __init__(self, task: Sampled, out: Generations, cache: Any, blocked: Int[Tensor, " k"]) -> None:
        (count, length), width, device = task.uniform.shape, task.query_mask.shape[1], task.uniform.device
        self.task, self.out, self.blocked = task, out, blocked
        self.rows = torch.arange(count, device=device)
        self.t = torch.ones(1, dtype=torch.int64, device=device)
        self.column = self.t + width - 1
        self.cache = fixed(cache, width, width + length - 1, self.column)
        self.tokens = out.responses[:, :1].clone()
        self.mask = torch.cat([task.query_mask, torch.zeros_like(out.response_mask[:, 1:])], dim=1).long()
        self.positions = position_ids(task.query_mask, first_position(task.model))[:, -1:] + 1
        self.extras = accepted(task.model, logits_to_keep=to_device(torch.tensor([-1]), device))
        self.extras |= accepted(task.model, position_ids=self.positions, cache_position=self.column)

    def __call__(self) -> None:
        task, place = self.task, (self.rows, self.t)
        self.mask.index_fill_(1, self.column, 1)
        output = task.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **self.extras,
        )
        tokens, logprobs, entropy = draw(output.logits[:, -1], task.uniform[place], task.settings, self.blocked)
        if task.value is not None and self.out.values is not None:
            self.out.values[place] = task.value(task.states.pop()[:, -1:])[:, 0]
        self.out.responses[place], self.out.logprobs[place], self.out.entropy[place] = tokens, logprobs, entropy
        self.tokens.copy_(tokens[:, None])
        for counter in (self.t, self.column, self.positions):
            counter.add_(1)

    def keep(self, kept: Int[Tensor, " n"]) -> None:
        """Continue with only these of the rows that are left."""
        self.rows, self.tokens, self.mask = self.rows[kept], self.tokens[kept], self.mask[kept]
        self.positions = self.positions[kept]
        self.extras |= accepted(self.task.model, position_ids=self.positions)
        self.cache.batch_select_indices(kept)


class Ends:
    """The responses as the host knows them: which have ended, and after how many tokens."""

    def __init__(self, task: Sampled, first: Int[Tensor, "B 1"], finished: Bool[Tensor, " B"]) -> None:
        count, length = task.uniform.shape
        self.task = task
        self.responses = torch.full((count, length), task.pad_id)
        self.responses[:, :1] = first
        self.finished = finished
        self.lengths = torch.where(finished, 1, length)

    def note(self, rows: Int[Tensor, " n"], t: int, tokens: Callable[[], Int[Tensor, "n 1"]]) -> None:
        """Note the tokens of these rows at place t, and which responses they end."""
        self.responses[rows, t] = tokens()[:, 0]
        if t + 1 < self.task.settings.min_new_tokens:
            return
        ended = self.task.ended(self.responses[:, : t + 1]) & ~self.finished
        self.lengths[ended] = t + 1
        self.finished = self.finished | ended


def decode(task: Sampled, out: Generations, cache: Any, finished: Bool[Tensor, " B"], form: StaticForm) -> None:
    """Fill `out`, which has the first token of each response, with the others. `cache` holds the prompts, and is used
    up; `finished` tells on the CPU which responses the first token ended."""
    length, earliest = task.uniform.shape[1], task.settings.min_new_tokens
    step = TokenStep(task, out, cache, task.blocked(1))
    ends = Ends(task, to_host([step.tokens])[0], finished)
    rows = torch.arange(len(finished))  # of step.rows, on the CPU
    running = runs(step, capture=form.graphs, failed=form.without_graphs)
    on_their_way: list[tuple[Tensor, int, Callable[[], Tensor]]] = []
    for t in range(1, length):
        going = (~ends.finished[rows]).nonzero()[:, 0]
        leave = t % LEAVE_EVERY == 0 and 0 < len(going) <= LEAVE_AT * len(rows)
        if leave:
            rows = rows[going]
            step.keep(to_device(going, out.responses.device))
        if leave or t == earliest:
            step.blocked = task.blocked(t)
            running = runs(step, capture=form.graphs, failed=form.without_graphs)
        next(running)
        on_their_way.append((rows, t, to_host_later(step.tokens)))
        if len(on_their_way) > 1:
            ends.note(*on_their_way.pop(0))
        if ends.finished.all():
            break
    for token in on_their_way:
        ends.note(*token)
    _clear_beyond(ends, out, task.pad_id)


def _clear_beyond(ends: Ends, out: Generations, pad_id: int) -> None:
    """Set the mask to the responses' lengths, and to padding and zeros what lies beyond them."""
    device, length = out.responses.device, out.responses.shape[1]
    out.finished.copy_(to_device(ends.finished, device))
    out.response_mask.copy_(torch.arange(length, device=device) < to_device(ends.lengths, device)[:, None])
    out.responses.masked_fill_(~out.response_mask, pad_id)
    for figures in (out.logprobs, out.entropy, out.values):
        if figures is not None:
            figures.masked_fill_(~out.response_mask, 0.0)
