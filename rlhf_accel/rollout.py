"""Prompts -> Responses -> Rollout: sample, score, and note what policy, critic and reference say.

Every rank works on its share of the prompts; the rollout that comes out is whole on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_accel import decoding
from rlhf_accel.config import RolloutConfig
from rlhf_accel.distributed import Runtime
from rlhf_accel.models import end_of_text_ids, model_inputs, reference_policy
from rlhf_accel.reward import Reward
from rlhf_accel.tokens import Tokens
from rlhf_accel.types import PromptBatch, Responses, Rollout, Sequences


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The collaborators of a rollout."""

    config: RolloutConfig
    runtime: Runtime
    tokens: Tokens
    reference: nn.Module | None  # None: the policy without its adapter

    def sample(self, prompts: PromptBatch, *, seed: int, step: int) -> Responses:
        """Responses to this rank's share of the prompts."""
        policy = self.runtime.plain_module.policy
        stop = self.tokens.stop_condition(self.config.stop, end_of_text_ids(policy))
        mine = prompts.select(self.runtime.share(len(prompts)))
        sampled = []
        for rows in self._chunks(len(mine)):
            chunk = mine.select(rows).to(self.runtime.device)
            uniform = decoding.uniforms(seed, step, chunk.index.tolist(), self.config.max_new_tokens)
            with self.runtime.autocast():
                sampled.append(
                    decoding.sample(
                        policy,
                        chunk.queries,
                        chunk.query_mask,
                        uniform.to(self.runtime.device),
                        sampling_settings(self.config),
                        pad_id=self.tokens.pad_id,
                        stop_ids=stop.ids,
                        ended=stop,
                    )
                )
        sequences = Sequences(
            queries=mine.queries,
            query_mask=mine.query_mask,
            responses=_rows([part.responses.cpu() for part in sampled], self.config.max_new_tokens, torch.int64),
            response_mask=_rows([part.response_mask.cpu() for part in sampled], self.config.max_new_tokens, torch.bool),
        )
        finished = torch.cat([part.finished.cpu() for part in sampled]) if sampled else torch.zeros(0, dtype=torch.bool)
        texts, responses = self.tokens.decode(sequences)
        return Responses(sequences=sequences, finished=finished, prompts=texts, texts=responses, columns=mine.columns)

    def score(self, responses: Responses, reward: Reward) -> Float[Tensor, " n"]:
        """Scores of this rank's responses."""
        return reward(responses.prompts, responses.texts, responses.columns)

    @torch.no_grad()
    def assess(self, responses: Responses, scores: Float[Tensor, " n"], count: int) -> Rollout:
        """Log-probabilities, values and reference of this rank's responses, gathered with those of the others.

        `count` is the number of rows on all ranks.
        """
        module = self.runtime.plain_module
        shape = responses.sequences.responses.shape
        logprobs, values, entropy, ref_logprobs = (torch.zeros(shape) for _ in range(4))
        for rows in self._chunks(len(responses)):
            chunk = responses.sequences.select(rows).trimmed().to(self.runtime.device)
            with self.runtime.autocast():
                said = module(*model_inputs(chunk), with_entropy=True)
                with reference_policy(module, self.reference) as reference:
                    said_by_reference = reference(chunk)
            length = chunk.responses.shape[1]
            logprobs[rows, :length] = said.logprobs.cpu()
            values[rows, :length] = said.values.cpu()
            assert said.entropy is not None
            entropy[rows, :length] = said.entropy.cpu()
            ref_logprobs[rows, :length] = said_by_reference.cpu()
        gather = self.runtime.gather_rows
        own = responses.sequences
        return Rollout(
            sequences=Sequences(
                queries=gather(own.queries, count),
                query_mask=gather(own.query_mask, count),
                responses=gather(own.responses, count),
                response_mask=gather(own.response_mask, count),
            ),
            finished=gather(responses.finished, count),
            scores=gather(scores, count),
            logprobs=gather(logprobs, count),
            ref_logprobs=gather(ref_logprobs, count),
            values=gather(values, count),
            entropy=gather(entropy, count),
            prompts=tuple(self.runtime.gather_list(responses.prompts)),
            texts=tuple(self.runtime.gather_list(responses.texts)),
        )

    def _chunks(self, count: int) -> Iterator[Int[Tensor, " n"]]:
        return iter(torch.arange(count).split(self.config.forward_batch_size) if count else ())


def sampling_settings(config: RolloutConfig) -> decoding.SamplingSettings:
    return decoding.SamplingSettings(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )


def _rows(parts: list[Tensor], length: int, dtype: torch.dtype) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, length, dtype=dtype)
