"""The data between the stages of a PPO step: frozen batches with a shape and dtype for every field.

    PromptBatch -> Responses -> Rollout -> Experience -> LossStats

Shapes: B rollouts (all of the step, or one process's share), Q padded query, R padded response, L = Q + R. Queries are
padded on the left and responses on the right, so that the first response token stands at column Q of every row; a mask
is True where a token counts. Masks, never token ids, say where the padding is: PAD may well be EOS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_accel.system.transfer import to_device

T = TypeVar("T", bound="_Batch")


class TokenOutputs(NamedTuple):
    """The outputs of `PolicyWithValue.forward` for each response token, all fp32.

    logprobs (B, R) in nats; values (B, R), before the token is chosen, or None without a critic; entropy (B, R) in nats
    of the distribution that the token was chosen from, or None if it was not asked for.
    """

    logprobs: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"] | None
    entropy: Float[Tensor, "B R"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Rows that are selected and moved together: tensors, tuples of strings, mappings of columns, other batches."""

    def select(self: T, rows: Int[Tensor, " n"]) -> T:
        """A new batch with these rows, in this order."""
        return replace(self, **{part.name: _select(getattr(self, part.name), rows) for part in fields(self)})

    def to(self: T, device: torch.device | str) -> T:
        """A new batch with its tensors on `device`."""
        moved = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, _Batch):
                value = value.to(device)
            moved[part.name] = to_device(value, device) if isinstance(value, Tensor) else value
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch(_Batch):
    """Prompts of one step, one row for each response to be sampled.

    index is the prompt's place in the step's global batch, the same for all samples of one prompt. sample is the row's
    own place there. With the run's seed and the step, it determines the random numbers of the response on any rank.
    """

    queries: Int[Tensor, "B Q"]  # int64, padded on the left
    query_mask: Bool[Tensor, "B Q"]
    index: Int[Tensor, " B"]
    sample: Int[Tensor, " B"]
    texts: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]]  # the data set's other columns, for reward functions
    transcripts: tuple[str, ...] | None = None  # of conversations: what rewards and samples show in place of the ids

    def __post_init__(self) -> None:
        _check("queries", self.queries, torch.int64, self.query_mask.shape)
        _check("query_mask", self.query_mask, torch.bool, self.queries.shape)
        _check("index", self.index, torch.int64, (len(self),))
        _check("sample", self.sample, torch.int64, (len(self),))
        _check_rows(len(self), {"texts": self.texts})
        _check_rows(len(self), self.columns)

    def __len__(self) -> int:
        return len(self.queries)

    def repeated(self, samples: int) -> PromptBatch:
        """Each prompt `samples` times in a row, each time with random numbers of its own.

        >>> one = torch.tensor([[7], [8]])
        >>> few = PromptBatch(queries=one, query_mask=one > 0, index=torch.tensor([0, 1]), sample=torch.tensor([0, 1]),
        ...     texts=("a", "b"), columns={})
        >>> few.repeated(2).index.tolist(), few.repeated(2).sample.tolist()
        ([0, 0, 1, 1], [0, 1, 2, 3])
        """
        if samples == 1:
            return self
        rows = torch.arange(len(self)).repeat_interleave(samples)
        numbers = self.sample[rows] * samples + torch.arange(samples).repeat(len(self))
        return replace(self.select(rows), sample=numbers)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences(_Batch):
    """Queries with their responses, as the model reads them.

    response_mask is True up to and including the stop token.
    """

    queries: Int[Tensor, "B Q"]
    query_mask: Bool[Tensor, "B Q"]
    responses: Int[Tensor, "B R"]
    response_mask: Bool[Tensor, "B R"]

    def __post_init__(self) -> None:
        _check("queries", self.queries, torch.int64, self.query_mask.shape)
        _check("query_mask", self.query_mask, torch.bool, self.queries.shape)
        _check("responses", self.responses, torch.int64, (len(self), self.response_mask.shape[1]))
        _check("response_mask", self.response_mask, torch.bool, self.responses.shape)

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Real tokens of each row, query and response together."""
        return self.query_mask.sum(1) + self.response_mask.sum(1)

    def trimmed(self) -> Sequences:
        """The same rows without the columns that are padding in all of them; at least one column of each stays.

        >>> rows = Sequences(
        ...     queries=torch.tensor([[0, 0, 5], [0, 6, 7]]),
        ...     query_mask=torch.tensor([[0, 0, 1], [0, 1, 1]]).bool(),
        ...     responses=torch.tensor([[8, 0, 0], [9, 3, 0]]),
        ...     response_mask=torch.tensor([[1, 0, 0], [1, 1, 0]]).bool(),
        ... )
        >>> rows.trimmed().queries.tolist(), rows.trimmed().responses.tolist()
        ([[0, 5], [6, 7]], [[8, 0], [9, 3]])
        """
        width = max(int(self.query_mask.sum(1).max()), 1) if len(self) else 1
        length = max(int(self.response_mask.sum(1).max()), 1) if len(self) else 1
        return Sequences(
            queries=self.queries[:, -width:],
            query_mask=self.query_mask[:, -width:],
            responses=self.responses[:, :length],
            response_mask=self.response_mask[:, :length],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses(_Batch):
    """Sampled responses of one process's share of the prompts, with the text that rewards read."""

    sequences: Sequences
    finished: Bool[Tensor, " B"]  # ended by a stop, not by the length limit
    logprobs: Float[Tensor, "B R"]  # those of sampling itself, as are the two that follow
    entropy: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"] | None  # None unless a critic read the policy's states meanwhile
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]]
    transcripts: tuple[str, ...] | None = None  # the prompts, if they are conversations

    def __post_init__(self) -> None:
        _check("finished", self.finished, torch.bool, (len(self),))
        for name in ("logprobs", "entropy", "values"):
            _check_if_there(name, getattr(self, name), torch.float32, self.sequences.responses.shape)
        _check_rows(len(self), {"prompts": self.prompts, "texts": self.texts})
        _check_rows(len(self), self.columns)

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout(_Batch):
    """All responses of a step, scored, with the outputs of policy, critic and reference; the same on every rank."""

    sequences: Sequences
    groups: Int[Tensor, " B"]  # the place of each response's prompt in the step's batch
    finished: Bool[Tensor, " B"]
    scores: Float[Tensor, " B"]
    term_scores: Mapping[str, Float[Tensor, " B"]] = field(default_factory=dict)  # of each of several rewards, by name
    partial_scores: Float[Tensor, "B R"]  # of the response before each token is chosen; 0 where not asked for
    logprobs: Float[Tensor, "B R"]
    ref_logprobs: Float[Tensor, "B R"]
    values: Float[Tensor, "B R"] | None  # None without a critic
    entropy: Float[Tensor, "B R"]
    prompts: tuple[str, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = self.sequences.responses.shape
        _check("finished", self.finished, torch.bool, shape[:1])
        _check("groups", self.groups, torch.int64, shape[:1])
        _check("scores", self.scores, torch.float32, shape[:1])
        for name in ("partial_scores", "logprobs", "ref_logprobs", "values", "entropy"):
            _check_if_there(name, getattr(self, name), torch.float32, shape)
        for name, scores in self.term_scores.items():
            _check(name, scores, torch.float32, shape[:1])
        _check_rows(len(self), {"prompts": self.prompts, "texts": self.texts})

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience(_Batch):
    """The input of the update; `old_` marks outputs of the policy and the critic that sampled.

    Values and returns are without the rollout's partial scores, which the critic need not fit. Both are None without a
    critic.
    """

    sequences: Sequences
    old_logprobs: Float[Tensor, "B R"]
    ref_logprobs: Float[Tensor, "B R"] | None = None  # where the loss has a KL of its own
    old_values: Float[Tensor, "B R"] | None
    rewards: Float[Tensor, "B R"]  # per token: the KL penalty, and the score on the last token
    advantages: Float[Tensor, "B R"]
    returns: Float[Tensor, "B R"] | None

    def __post_init__(self) -> None:
        shape = self.sequences.responses.shape
        for name in ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns"):
            _check_if_there(name, getattr(self, name), torch.float32, shape)

    def __len__(self) -> int:
        return len(self.sequences)

    def trimmed(self) -> Experience:
        """The same rows without the columns that are padding in all of them."""
        sequences = self.sequences.trimmed()
        length = sequences.responses.shape[1]
        shorter = {field.name: getattr(self, field.name) for field in fields(self)}
        shorter = {name: value[:, :length] for name, value in shorter.items() if isinstance(value, Tensor)}
        return replace(self, sequences=sequences, **shorter)


@dataclass(frozen=True, kw_only=True)
class LossStats:
    """Means over the response tokens of all minibatches of a PPO step, over all ranks.

    policy, value, kl and total are averaged as ppo.loss_reduction says.
    """

    policy: float
    value: float | None  # as value_clip_fraction, None without a critic
    kl: float | None  # nats per token, of the estimator in the loss; None if the KL is in the reward
    total: float
    approx_kl: float  # nats per token, k3 of the sampling policy against the current one
    clip_fraction: float
    value_clip_fraction: float | None
    ratio_max: float
    first_ratio_error: float  # max |ratio - 1| before the first optimizer step
    first_log_ratio_rms: float  # nats, over the tokens of the first minibatch, before that step
    first_log_ratio_max: float  # the largest absolute value among them
    grad_norm: float
    skipped: int


def _select(value: Any, rows: Int[Tensor, " n"]) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[rows.to(value.device)]
    if isinstance(value, _Batch):
        return value.select(rows)
    if isinstance(value, Mapping):
        return {key: _select(item, rows) for key, item in value.items()}
    return tuple(value[row] for row in rows.tolist())


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(shape)}")


def _check_if_there(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is not None:
        _check(name, tensor, dtype, shape)


def _check_rows(count: int, named: Mapping[str, tuple[Any, ...]]) -> None:
    for name, rows in named.items():
        if len(rows) != count:
            raise ValueError(f"{name} has {len(rows)} rows, expected {count}")
