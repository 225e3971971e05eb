"""Prompts -> Responses -> Rollout: sample, then the forward passes of policy, critic and reference.

Every rank works on its share of the prompts, and every rank gets the whole rollout. All ranks run equally many forward
passes, since with ZeRO-3 each is a collective: a rank that has finished its share repeats a row and drops the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_accel.algorithm.batches import PromptBatch, Responses, Rollout, Sequences
from rlhf_accel.config.schema import RolloutConfig
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.batching import cut_by_tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models.calls import model_inputs
from rlhf_accel.models.masks import known_mask, mask_of
from rlhf_accel.models.reference import reference_policy
from rlhf_accel.rollout.engine import Engine, Seeds
from rlhf_accel.system.transfer import to_host


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Makes rollouts, for training and for evaluations. Both methods are called inside one `runtime.gathered()`."""

    config: RolloutConfig
    runtime: Runtime
    tokens: Tokens
    engine: Engine
    reference: nn.Module | None  # None: the policy without its adapter
    pass_tokens: int  # most tokens of a pass of critic and reference, padding included
    recompute: bool  # log-probabilities, entropy and values by a pass of the policy, instead of those of sampling

    def sample(self, prompts: PromptBatch, seeds: Seeds) -> Responses:
        """Responses to this rank's share of the prompts, of which there is at least one on all ranks."""
        generated = self.engine.generate(prompts, self.config, seeds)
        mine = prompts.select(self.runtime.share(len(prompts)))
        sequences = Sequences(
            queries=mine.queries,
            query_mask=mine.query_mask,
            responses=generated.responses,
            response_mask=generated.response_mask,
        )
        texts, continuations = self.tokens.decode(sequences)
        return Responses(
            sequences=sequences,
            finished=generated.finished,
            logprobs=generated.logprobs,
            entropy=generated.entropy,
            values=generated.values,
            prompts=mine.transcripts or texts,
            texts=continuations,
            columns=mine.columns,
            transcripts=mine.transcripts,
        )

    def forward(
        self,
        prompts: PromptBatch,
        responses: Responses,
        scores: Float[Tensor, " n"],
        partial_scores: Float[Tensor, "n R"],
        term_scores: Mapping[str, Float[Tensor, " n"]] | None = None,
    ) -> Rollout:
        """The rollout: log-probabilities, values and reference for this rank's responses, gathered from all ranks.

        `prompts` are those of all ranks; the scores are those of this rank's responses.
        """
        gather, own, count = self.runtime.gather_rows, responses.sequences, len(prompts)
        sequences = Sequences(
            queries=gather(own.queries, count),
            query_mask=gather(own.query_mask, count),
            responses=gather(own.responses, count),
            response_mask=gather(own.response_mask, count),
        )
        noted = self._noted(responses)
        lengths = sequences.query_mask.sum(1), sequences.response_mask.sum(1)
        shares, rank = self.runtime.shares(count), self.runtime.rank
        passed: list[tuple[Tensor, dict[str, Tensor]]] = []
        with self.runtime.inference():
            for placed in cut_by_tokens(*lengths, shares, self.pass_tokens)[rank]:
                rows = placed - shares[rank][:1]  # counted from this rank's first
                chunk = (own.select(rows) if len(rows) else sequences.select(torch.tensor([0]))).trimmed()
                with known_mask(mask_of(chunk.query_mask, chunk.response_mask), self.runtime.device):
                    found = self._passes(chunk.to(self.runtime.device))  # a collective of all ranks with ZeRO-3
                passed += [(rows, found)] if len(rows) else []
        figures = iter(to_host([figure for _, found in passed for figure in found.values()]))
        for rows, found in passed:
            for name in found:
                part = next(figures)
                noted[name][rows, : part.shape[1]] = part
        # A sample with NaN is never trained on, even if the model gives finite numbers for it now.
        noted["logprobs"][~responses.logprobs.isfinite().all(1)] = torch.nan
        return Rollout(
            sequences=sequences,
            groups=prompts.index,
            finished=gather(responses.finished, count),
            scores=gather(scores, count),
            term_scores={name: gather(column, count) for name, column in (term_scores or {}).items()},
            partial_scores=gather(partial_scores, count),
            prompts=tuple(self.runtime.gather_list(responses.prompts)),
            texts=tuple(self.runtime.gather_list(responses.texts)),
            values=gather(noted.pop("values"), count) if "values" in noted else None,
            **{name: gather(tensor, count) for name, tensor in noted.items()},
        )

    def _noted(self, responses: Responses) -> dict[str, Tensor]:
        """The outputs of the models per token: those of sampling, or zeros to be filled."""
        empty = torch.zeros(responses.sequences.responses.shape)
        noted = {"logprobs": responses.logprobs.clone(), "entropy": responses.entropy.clone()}
        if self.runtime.plain_module.has_critic:
            noted["values"] = empty.clone() if responses.values is None else responses.values.clone()
        return {**noted, "ref_logprobs": empty}

    def _passes(self, chunk: Sequences) -> dict[str, Tensor]:
        """The outputs that have to be computed for these sequences, by their names in the rollout."""
        module, found, inputs = self.runtime.plain_module, {}, model_inputs(chunk)
        if self.recompute:
            outputs = module(*inputs, with_entropy=True)
            found = {"logprobs": outputs.logprobs, "entropy": outputs.entropy, "values": outputs.values}
            found = {name: tensor for name, tensor in found.items() if tensor is not None}
        elif module.has_critic and not module.critic_reads_policy:
            found["values"] = module.values(*inputs)
        with reference_policy(module, self.reference) as reference:
            found["ref_logprobs"] = reference(chunk)
        return found
