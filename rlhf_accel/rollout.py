"""Prompts -> Responses -> Rollout: sample, score, and note what policy, critic and reference say.

Every rank works on its share of the prompts; the rollout that comes out is whole on all of them. Ranks run equally many
forward passes, since with ZeRO-3 each is a collective: one whose share is used up repeats a row that is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_accel import decoding
from rlhf_accel.config import RolloutConfig
from rlhf_accel.distributed import Runtime
from rlhf_accel.metrics import Stopwatch
from rlhf_accel.models import LanguageModel, end_of_text_ids, model_inputs, reference_policy
from rlhf_accel.reward import Reward
from rlhf_accel.tokens import StopCondition, Tokens
from rlhf_accel.types import PromptBatch, Responses, Rollout, Sequences


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The collaborators of a rollout."""

    config: RolloutConfig
    runtime: Runtime
    tokens: Tokens
    reference: nn.Module | None  # None: the policy without its adapter

    def rollout(self, prompts: PromptBatch, reward: Reward, *, seed: int, step: int, watch: Stopwatch) -> Rollout:
        """Sample a response to every prompt, score it, and note what policy, critic and reference say of it.

        `watch` takes the time as `rollout` and `score`.
        """
        with ExitStack() as stack:
            with watch("rollout"):
                stack.enter_context(self.runtime.gathered())
                responses = self.sample(prompts, seed=seed, step=step)
            with watch("score"):
                scores = self.score(responses, reward)
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
            sampled.append((said.responses[kept].cpu(), said.response_mask[kept].cpu(), said.finished[kept].cpu()))
        responses, response_mask, finished = (torch.cat(parts) for parts in zip(*sampled, strict=True))
        sequences = Sequences(
            queries=mine.queries, query_mask=mine.query_mask, responses=responses, response_mask=response_mask
        )
        texts, continuations = self.tokens.decode(sequences)
        return Responses(
            sequences=sequences, finished=finished, prompts=texts, texts=continuations, columns=mine.columns
        )

    def score(self, responses: Responses, reward: Reward) -> Float[Tensor, " n"]:
        """Scores of this rank's responses."""
        return reward(responses.prompts, responses.texts, responses.columns)

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
