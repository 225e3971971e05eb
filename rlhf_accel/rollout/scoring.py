"""Prompts -> Responses -> Rollout: sample, score, and note what policy, critic and reference say.

Every rank works on its share of the prompts; the rollout that comes out is whole on all of them. Ranks run equally many
forward passes, since with ZeRO-3 each is a collective: one whose share is used up repeats a row that is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_accel.algorithm.batches import PromptBatch, Responses, Rollout, Sequences
from rlhf_accel.config.schema import RolloutConfig
from rlhf_accel.data.tokenizer import StopCondition, Tokens
from rlhf_accel.distributed.batching import cut_by_tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.models.calls import model_inputs
from rlhf_accel.models.loading import LanguageModel
from rlhf_accel.models.policy import end_of_text_ids
from rlhf_accel.models.reference import reference_policy
from rlhf_accel.reward import Reward, RewardError
from rlhf_accel.rollout import sampling as decoding
from rlhf_accel.runs.metrics import Stopwatch

WITHOUT_PARTS = "set reward.partial_every=0 (and ppo.lam=0.95)"


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
    pass_tokens: int  # of a pass of critic and reference, padding included
    keeps_said: bool  # whether log-probabilities, entropy and values are those of sampling itself
    fast_kernels: bool = True

    def rollout(
        self,
        prompts: PromptBatch,
        reward: Reward,
        *,
        seed: int,
        step: int,
        watch: Stopwatch,
        between: Callable[[], None] = lambda: None,
        partial_every: int = 0,
    ) -> Rollout:
        """Sample a response to every prompt, score it, and note what policy, critic and reference say of it.

        Every `partial_every` tokens the response is scored as far as it goes, too; 0 does not.
        `watch` takes the time as `rollout` and `score`; `between` is called where one of the two ends, and before each
        call for parts. Numbers that are not finite are for the caller to find. Raises `FailedScoring` on every rank if
        scoring failed on any.
        """
        with ExitStack() as stack:
            with watch("rollout"):
                stack.enter_context(self.runtime.gathered())
                responses = self.sample(prompts, seed=seed, step=step)
            between()
            with watch("score"):
                scores = self.score(responses, reward)
                partial_scores = self.score_parts(responses, reward, partial_every, between)
            between()
            with watch("rollout"):
                return self.assess(responses, scores, partial_scores, len(prompts))

    def sample(self, prompts: PromptBatch, *, seed: int, step: int) -> Responses:
        """Responses to this rank's share of the prompts, of which there is at least one on all ranks."""
        policy = self.runtime.plain_module.policy
        stop = self.tokens.stop_condition(self.config.stop, end_of_text_ids(policy))
        mine = prompts.select(self.runtime.share(len(prompts)))
        sampled = []
        size = self.config.forward_batch_size
        layout = kernels.packed(policy, min(size, max(len(mine), 1))) if self.fast_kernels else nullcontext()
        with self.runtime.autocast(), layout:
            for rows in self._passes(len(prompts), size):
                chunk = mine.select(rows) if len(rows) else prompts.select(torch.tensor([0]))
                said = self._continue(policy, chunk.to(self.runtime.device), stop, seed, step)
                kept = slice(None) if len(rows) else slice(0)
                parts = (said.responses, said.response_mask, said.finished, said.logprobs, said.entropy, said.values)
                sampled.append([part[kept].cpu() for part in parts])
        columns = [torch.cat(parts) for parts in zip(*sampled, strict=True)]
        responses, response_mask, finished, logprobs, entropy, values = columns
        sequences = Sequences(
            queries=mine.queries, query_mask=mine.query_mask, responses=responses, response_mask=response_mask
        )
        texts, continuations = self.tokens.decode(sequences)
        return Responses(
            sequences=sequences,
            finished=finished,
            logprobs=logprobs,
            entropy=entropy,
            values=values,
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

    def score_parts(
        self, responses: Responses, reward: Reward, every: int, between: Callable[[], None] = lambda: None
    ) -> Float[Tensor, "n R"]:
        """Scores of this rank's responses as they stand before each token; 0 throughout for an `every` of 0.

        They are scored before the first token and after every `every`. In between, and where the reward has no finite
        number for a part, the last score stands; 0 if there is none yet. `between` is called before each call of the
        reward, which may be many. Raises as `score`.
        """
        mask = responses.sequences.response_mask
        scores, last = torch.zeros(mask.shape), torch.zeros(len(mask))
        if every == 0:
            return scores
        for start in range(0, mask.shape[1], every):
            between()
            rows = mask[:, start].nonzero()[:, 0]  # those that go on from here
            parts = responses.select(rows)
            read = torch.arange(mask.shape[1]).expand(len(rows), -1) < start
            prompts, texts = self.tokens.decode(replace(parts.sequences, response_mask=read))
            try:
                found = self.score(replace(parts, prompts=prompts, texts=texts), reward)
            except FailedScoring as error:
                said = f"{error}; it was asked about unfinished responses (reward.partial_every={every})"
                said += f": let it score them, or {WITHOUT_PARTS}"
                raise FailedScoring(said, error.inputs) from error.__cause__
            last[rows] = torch.where(found.isfinite(), found, last[rows])
            scores[:, start : start + every] = last[:, None]
        return scores

    @torch.no_grad()
    def assess(
        self, responses: Responses, scores: Float[Tensor, " n"], partial_scores: Float[Tensor, "n R"], count: int
    ) -> Rollout:
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
        sound = responses.logprobs.isfinite().all(1)
        logprobs, entropy, values = (part.clone() for part in (responses.logprobs, responses.entropy, responses.values))
        ref_logprobs = torch.zeros(own.responses.shape)
        lengths = sequences.query_mask.sum(1), sequences.response_mask.sum(1)
        shares, rank = self.runtime.shares(count), self.runtime.rank
        for placed in cut_by_tokens(*lengths, shares, self.pass_tokens)[rank]:
            rows = placed - shares[rank][:1]  # counted from this rank's first
            chunk = (own.select(rows) if len(rows) else sequences.select(torch.tensor([0]))).trimmed()
            chunk = chunk.to(self.runtime.device)
            noted: list[tuple[Tensor, Tensor]] = []
            with self.runtime.autocast():
                inputs = model_inputs(chunk)
                if not self.keeps_said:
                    said = module(*inputs, with_entropy=True)
                    noted += [(logprobs, said.logprobs), (values, said.values), (entropy, said.entropy)]
                elif not module.critic_reads_policy:
                    noted += [(values, module.values(*inputs))]
                with reference_policy(module, self.reference) as reference:
                    noted += [(ref_logprobs, reference(chunk))]
            for whole, part in noted if len(rows) else ():
                whole[rows, : part.shape[1]] = part.cpu()
        logprobs[~sound] = torch.nan  # never learnt from, also if the model is itself again by now
        return Rollout(
            sequences=sequences,
            finished=gather(responses.finished, count),
            scores=gather(scores, count),
            partial_scores=gather(partial_scores, count),
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
        module = self.runtime.plain_module
        uniform = decoding.uniforms(seed, step, prompts.index.tolist(), self.config.max_new_tokens)
        return decoding.sample(
            policy,
            prompts.queries,
            prompts.query_mask,
            uniform.to(self.runtime.device),
            sampling_settings(self.config),
            pad_id=self.tokens.pad_id,
            stop_ids=stop.ids,
            ended=stop.after(prompts.queries, prompts.query_mask),
            everywhere=self.runtime.everywhere,
            value=module.value_head if self.keeps_said and module.critic_reads_policy else None,
        )

    def _passes(self, count: int, size: int) -> Iterator[Int[Tensor, " n"]]:
        """This rank's share of `count` rows, from 0, in passes of `size`; as many as the longest share needs."""
        shares = self.runtime.shares(count)
        mine = torch.arange(len(shares[self.runtime.rank]))
        return (mine[start : start + size] for start in range(0, len(shares[0]), size))


def sampling_settings(config: RolloutConfig) -> decoding.SamplingSettings:
    return decoding.SamplingSettings(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
