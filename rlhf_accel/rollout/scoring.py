"""Scores of sampled responses: each rank scores its own share.

Knows rewards and texts; knows no model and no random number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_accel.algorithm.batches import Responses
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.reward import Reward, RewardError

WITHOUT_PARTS = "set reward.partial_every=0 (and ppo.lam=0.95)"


class FailedScoring(RewardError):
    """The reward failed for good on some rank; `inputs` are the prompts, responses and columns of all ranks."""

    def __init__(self, message: str, inputs: dict[str, Any]) -> None:
        super().__init__(message)
        self.inputs = inputs


def score(runtime: Runtime, responses: Responses, reward: Reward) -> Float[Tensor, " n"]:
    """Scores of this rank's responses. Raises `FailedScoring` on every rank if the reward failed on any."""
    return reward.total(score_terms(runtime, responses, reward))


def score_terms(runtime: Runtime, responses: Responses, reward: Reward) -> Float[Tensor, "n T"]:
    """Scores of this rank's responses by each of the reward's T terms, see `Reward.term_scores`. Raises as `score`."""
    scores, failure, cause = torch.zeros(len(responses), len(reward.terms)), None, None
    try:
        scores = reward.term_scores(responses.prompts, responses.texts, responses.columns)
    except RewardError as error:
        failure, cause = str(error), error
    failure = runtime.first_failure(failure)
    if failure is not None:
        gather = runtime.gather_list
        texts = {"prompts": gather(responses.prompts), "responses": gather(responses.texts)}
        columns = {name: gather(column) for name, column in responses.columns.items()}
        raise FailedScoring(failure, {**texts, "columns": columns}) from cause
    return scores


def score_parts(
    runtime: Runtime,
    tokens: Tokens,
    responses: Responses,
    reward: Reward,
    every: int,
    between: Callable[[], None] = lambda: None,
) -> Float[Tensor, "n R"]:
    """Scores of this rank's responses up to each token, before it is chosen; all 0 for an `every` of 0.

    They are scored before the first token and after every `every` tokens. In between, and where the score of a part is
    not finite, the previous score is kept; 0 if there is none yet. `between` is called before each call of the reward.
    Raises as `score`.
    """
    mask = responses.sequences.response_mask
    scores, last = torch.zeros(mask.shape), torch.zeros(len(mask))
    if every == 0:
        return scores
    for start in range(0, mask.shape[1], every):
        between()
        rows = mask[:, start].nonzero()[:, 0]  # those that continue from here
        parts = responses.select(rows)
        read = torch.arange(mask.shape[1]).expand(len(rows), -1) < start
        prompts, texts = tokens.decode(replace(parts.sequences, response_mask=read))
        try:
            found = score(runtime, replace(parts, prompts=parts.transcripts or prompts, texts=texts), reward)
        except FailedScoring as error:
            message = f"{error}; it was asked about unfinished responses (reward.partial_every={every})"
            message += f": let it score them, or {WITHOUT_PARTS}"
            raise FailedScoring(message, error.inputs) from error.__cause__
        last[rows] = torch.where(found.isfinite(), found, last[rows])
        scores[:, start : start + every] = last[:, None]
    return scores
