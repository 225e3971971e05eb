"""Engines: prompts in, generations out. The built-in engine samples with the module that is trained.

An engine knows how to generate and how to get the current weights. It knows no scores and no forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.config.schema import RolloutConfig, sampled_at_once
from rlhf_accel.data.tokenizer import StopCondition, Tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models import cpu_kernels
from rlhf_accel.models.policy import end_of_text_ids
from rlhf_accel.rollout.decoding import StaticForm
from rlhf_accel.rollout.drawing import SamplingSettings
from rlhf_accel.rollout.generations import Generations
from rlhf_accel.rollout.sampling import sample, uniforms
from rlhf_accel.system.transfer import to_device


class Seeds(NamedTuple):
    """The seeds of a rollout. With a row's `PromptBatch.sample`, they determine its random numbers on any rank."""

    run: int
    step: int


class Engine(Protocol):
    """Samples responses with the policy's current weights.

    exact: its log-probabilities equal those of the trainer's own passes, up to rounding. repeatable: the same seeds
    give the same samples. If one of the two is False, the caller recomputes or corrects.
    """

    @property
    def exact(self) -> bool: ...

    @property
    def repeatable(self) -> bool: ...

    def generate(self, prompts: PromptBatch, settings: RolloutConfig, seeds: Seeds) -> Generations:
        """Responses to this rank's share of the prompts, of which there is at least one on all ranks; on the CPU."""

    def sync(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take the trainable weights as they are after an update. Called by all ranks; `weights` is a collective."""


@dataclass(frozen=True, kw_only=True)
class BuiltinEngine:
    """Samples with the trained module itself, with a key-value cache; each rank samples its share.

    With `with_values`, a critic that reads the policy's states is evaluated at the same time. `static` is what is known
    of sampling in the static form, which the config asks for (`rollout.static_cache`).
    """

    runtime: Runtime
    tokens: Tokens
    with_values: bool
    static: StaticForm
    fast_kernels: bool = True
    exact: bool = True
    repeatable: bool = True

    def generate(self, prompts: PromptBatch, settings: RolloutConfig, seeds: Seeds) -> Generations:
        policy = self.runtime.plain_module.policy
        stop = self.tokens.stop_condition(settings.stop, end_of_text_ids(policy))
        mine = prompts.select(self.runtime.share(len(prompts)))
        size = sampled_at_once(settings, self.runtime.world_size, on_gpu=self.runtime.device.type == "cuda")
        layout = cpu_kernels.packed(policy, min(size, max(len(mine), 1))) if self.fast_kernels else nullcontext()
        passes = []
        with self.runtime.inference(), layout:
            for rows in self._passes(len(prompts), size):
                chunk = mine.select(rows) if len(rows) else prompts.select(torch.tensor([0]))
                generated = self._continue(policy, chunk, stop, settings, seeds)
                passes.append(generated.rows(slice(None) if len(rows) else slice(0)))
        return Generations.joined(passes)

    def sync(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Nothing to do: the module that is trained is the one that samples."""

    def _continue(
        self, policy: Any, prompts: PromptBatch, stop: StopCondition, settings: RolloutConfig, seeds: Seeds
    ) -> Generations:
        module, device = self.runtime.plain_module, self.runtime.device
        uniform = uniforms(seeds.run, seeds.step, prompts.sample.tolist(), settings.max_new_tokens)
        return sample(
            policy,
            to_device(prompts.queries, device),
            to_device(prompts.query_mask, device),
            to_device(uniform, device),
            sampling_settings(settings),
            pad_id=self.tokens.pad_id,
            stop_ids=stop.ids,
            ended=stop.after(prompts.queries, prompts.query_mask),
            everywhere=self.runtime.everywhere,
            value=module.value_head if self.with_values else None,
            # The ranks that share the passes of cut weights wait for each other at every token.
            static=self.static if asks_for_static(settings, self.static) and self.runtime.has_whole_weights else None,
        )

    def _passes(self, count: int, size: int) -> Iterator[Int[Tensor, " n"]]:
        """This rank's share of `count` rows, from 0, in passes of `size`; as many as the longest share needs."""
        shares = self.runtime.shares(count)
        mine = torch.arange(len(shares[self.runtime.rank]))
        return (mine[start : start + size] for start in range(0, len(shares[0]), size))


def asks_for_static(settings: RolloutConfig, form: StaticForm) -> bool:
    """Whether to sample in the static form where the model can; without graphs only if it is asked for by name."""
    return settings.static_cache == "always" or (settings.static_cache == "auto" and form.graphs)


def sampling_settings(config: RolloutConfig) -> SamplingSettings:
    return SamplingSettings(**{field.name: getattr(config, field.name) for field in fields(SamplingSettings)})
