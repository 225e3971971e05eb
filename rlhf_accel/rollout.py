"""Prompts -> Responses -> Rollout: sample, score, and note what policy, critic and reference say.

Every rank works on its share of the prompts; the rollout that comes out is whole on all of them. Ranks run equally many
forward passes, since with ZeRO-3 each is a collective: one whose share is used up repeats a row that is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_accel import decoding
from rlhf_accel.config import RolloutConfig
from rlhf_accel.distributed import Runtime
from rlhf_accel.metrics import Stopwatch
from rlhf_accel.models import LanguageModel, end_of_text_ids, model_inputs, reference_policy
from rlhf_accel.reward import Reward, RewardError
from rlhf_accel.tokens import StopCondition, Tokens
from rlhf_accel.types import PromptBatch, Responses, Rollout, Sequences


class FailedScoring(RewardError):
    """The reward failed for good on some rank; `inputs` are the prompts, responses and columns of all ranks."""

    def __init__(self, message: str, inputs: dict[str, Any]) -> None:
        super().__init__(message)
        self.inputs = inputs


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The collaborators of a rollout."""

    config: RolloutConfig
    runtime: Runtime
    tokens: Tokens
    reference: nn.Module | None  # None: the policy without its adapter

    def rollout(
        self,
        prompts: PromptBatch,
        reward: Reward,
        *,
        seed: int,
        step: int,
        watch: Stopwatch,
        between: Callable[[], None] = lambda: None,
    ) -> Rollout:
        """Sample a response to every prompt, score it, and note what policy, critic and reference say of it.

        `watch` takes the time as `rollout` and `score`; `between` is called where one of the two ends. Numbers that are
        not finite are for the caller to find. Raises `FailedScoring` on every rank if scoring failed on any.
        """
        with ExitStack() as stack:
            with watch("rollout"):
                stack.enter_context(self.runtime.gathered())
                responses = self.sample(prompts, seed=seed, step=step)
            between()
            with watch("score"):
                scores = self.score(responses, reward)
            between()
            with watch("rollout"):
                return self.assess(responses, scores, len(prompts))

    def sample(self, prompts: PromptBatch, *, seed: int, step: int) -> Responses:
        """Responses to this rank's share of the prompts, of which there is at least one on all ranks."""
        policy = self.runtime.plain_module.policy
        stop = self.tokens.stop_condition(self.config.stop, end_of_text_ids(policy))
        mine = prompts.select(self.runtime.share(len(prompts)))
        sampled = []
        for rows in self._chunks(len(prompts)):
            chunk = mine.select(rows) if len(rows) else prompts.select(torch.tensor([0]))
            said = self._continue(policy, chunk.to(self.runtime.device), stop, seed, step)
            kept = slice(None) if len(rows) else slice(0)
            sound = said.logprobs.isfinite().all(1)
            parts = (said.responses, said.response_mask, said.finished, sound)
            sampled.append([part[kept].cpu() for part in parts])
        responses, response_mask, finished, sound = (torch.cat(parts) for parts in zip(*sampled, strict=True))
        sequences = Sequences(
            queries=mine.queries, query_mask=mine.query_mask, responses=responses, response_mask=response_mask
        )
        texts, continuations = self.tokens.decode(sequences)
        return Responses(
            sequences=sequences,
            finished=finished,
            sound=sound,
            prompts=texts,
            texts=continuations,
            columns=mine.columns,
        )

    def score(self, responses: Responses, reward: Reward) -> Float[Tensor, " n"]:
        """Scores of this rank's responses. Raises `FailedScoring` on every rank if the reward failed on any."""
        scores, failure, cause = torch.zeros(len(responses)), None, None
        try:
            scores = reward(responses.prompts, responses.texts, responses.columns)
        except RewardError as error:
            failure, cause = str(error), error
        failure = self.runtime.first_failure(failure)
        if failure is not None:
            gather = self.runtime.gather_list
            texts = {"prompts": gather(responses.prompts), "responses": gather(responses.texts)}
            columns = {name: gather(column) for name, column in responses.columns.items()}
            raise FailedScoring(failure, {**texts, "columns": columns}) from cause
        return scores

    @torch.no_grad()
    def assess(self, responses: Responses, scores: Float[Tensor, " n"], count: int) -> Rollout:
        """Log-probabilities, values and reference of this rank's responses, gathered with those of the others.

        `count` is the number of rows on all ranks.
        """
        module, gather, own = self.runtime.plain_module, self.runtime.gather_rows, responses.sequences
        sequences = Sequences(
            queries=gather(own.queries, count),
            query_mask=gather(own.query_mask, count),
            responses=gather(own.responses, count),
            response_mask=gather(own.response_mask, count),
        )
        logprobs, values, entropy, ref_logprobs = (torch.zeros(own.responses.shape) for _ in range(4))
        for rows in self._chunks(count):
            chunk = (own.select(rows) if len(rows) else sequences.select(torch.tensor([0]))).trimmed()
            chunk = chunk.to(self.runtime.device)
            with self.runtime.autocast():
                said = module(*model_inputs(chunk), with_entropy=True)
                with reference_policy(module, self.reference) as reference:
                    said_by_reference = reference(chunk)
            if len(rows):
                length = chunk.responses.shape[1]
                logprobs[rows, :length] = said.logprobs.cpu()
                values[rows, :length] = said.values.cpu()
                entropy[rows, :length] = said.entropy.cpu()
                ref_logprobs[rows, :length] = said_by_reference.cpu()
        logprobs[~responses.sound] = torch.nan  # never learnt from, also if the model is itself again by now
        return Rollout(
            sequences=sequences,
            finished=gather(responses.finished, count),
            scores=gather(scores, count),
            logprobs=gather(logprobs, count),
            ref_logprobs=gather(ref_logprobs, count),
            values=gather(values, count),
            entropy=gather(entropy, count),
            prompts=tuple(self.runtime.gather_list(responses.prompts)),
            texts=tuple(self.runtime.gather_list(responses.texts)),
        )

    def _continue(
        self, policy: LanguageModel, prompts: PromptBatch, stop: StopCondition, seed: int, step: int
    ) -> decoding.Sampled:
        uniform = decoding.uniforms(seed, step, prompts.index.tolist(), self.config.max_new_tokens)
        with self.runtime.autocast():
            return decoding.sample(
                policy,
                prompts.queries,
                prompts.query_mask,
                uniform.to(self.runtime.device),
                sampling_settings(self.config),
                pad_id=self.tokens.pad_id,
                stop_ids=stop.ids,
                ended=stop,
                everywhere=self.runtime.everywhere,
            )

    def _chunks(self, count: int) -> Iterator[Int[Tensor, " n"]]:
        """This rank's share of `count` rows, counted from 0, in passes; as many passes as the longest share needs."""
        mine = torch.arange(len(self.runtime.share(count)))
        longest, size = -(-count // self.runtime.world_size), self.config.forward_batch_size
        return (mine[start : start + size] for start in range(0, longest, size))


def sampling_settings(config: RolloutConfig) -> decoding.SamplingSettings:
    return decoding.SamplingSettings(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
