"""PPO from human feedback: the step and the update (Schulman et al. 2017; Ziegler et al. 2019).

Evaluation, checkpoints, stop signals and everything else around a step are in `run.py`; `setup.py` builds the parts of
a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.advantages import make_experience
from rlhf_accel.algorithm.batches import Experience, LossStats, PromptBatch, Responses, Rollout
from rlhf_accel.algorithm.kl import AdaptiveKLController, FixedKLController
from rlhf_accel.config import places
from rlhf_accel.config.rules import check_trainable
from rlhf_accel.config.schema import Config, OptimConfig, PPOConfig
from rlhf_accel.data.prompts import own_prompts
from rlhf_accel.distributed.batching import cut_micro_batches
from rlhf_accel.models.masks import known_mask, mask_of
from rlhf_accel.models.positions import check_prompts
from rlhf_accel.models.trainable import training_mode
from rlhf_accel.reward import RewardFunction
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.rollout.scoring import score, score_parts, score_terms
from rlhf_accel.runs.checkpoint import Progress
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.process import reseed
from rlhf_accel.system.stopwatch import Stopwatch
from rlhf_accel.training import failures, setup
from rlhf_accel.training.first_step import FirstStep
from rlhf_accel.training.losses import Terms, UpdateTotals, computed_terms
from rlhf_accel.training.nonfinite import Fault, rollout_fault
from rlhf_accel.training.run import Run
from rlhf_accel.training.setup import Setup
from rlhf_accel.training.step_metrics import step_metrics

_MINIBATCHES = 4  # stream of random numbers; data/prompts.py has the others
_CALIBRATION_STEP = 0  # training steps count from 1
_STEP = 0  # stream of the global random numbers; evaluations have their own (run.py)


class PPOTrainer:
    """A PPO run from a config, with the config's reward or one passed as a callable.

    `fit()` does the whole run. `step(prompts)` takes one step on prompts of your own and returns its metrics.
    Raises `ConfigError` for everything that cannot work, before anything is trained or written.
    """

    def __init__(self, config: Config, reward: RewardFunction | None = None) -> None:
        check_trainable(config)
        given, config = config, places.absolute(config)
        self.config = config
        self.runtime = setup.start(config)
        self.run = Run(self, given)
        resume, log = self.run.resume_from, self.run.line.say
        self.setup = Setup.of(config, self.runtime, reward, resume=resume, log=log)
        self.run.check_exports(self.setup)
        self.collector = self.setup.collector
        self.reward = self.setup.reward
        self.progress = Progress(kl_coef=config.ppo.kl_coef)
        self.kl_controller = kl_controller(self.config.ppo, self.progress.kl_coef)
        self.rollout: Rollout | None = None  # of the last step
        self.columns: Mapping[str, Sequence[Any]] = {}  # of its prompts
        self.between: Callable[[], None] = lambda: None  # called between the phases of a step
        self._prepared = False

    @property
    def folder(self) -> Path:
        """The folder of the run. A default folder may change until training begins: another run may take it."""
        return self.run.recorder.folder

    def fit(self) -> dict[str, Any]:
        """Calibrate, evaluate, train, evaluate, export. Returns the content of `summary.json`.

        SIGTERM and SIGUSR1 end it with a checkpoint and `SystemExit` 143. Raises `RunFailed` if it cannot continue.
        """
        return self.run.fit()

    def step(self, prompts: PromptBatch | Sequence[str]) -> dict[str, float]:
        """One PPO step. Returns the step's metrics, the same on every rank.

        Raises `ConfigError` for the first prompt that has no text or, with its response, too many positions, for fewer
        responses than minibatches, and for a step beyond the learning-rate schedule.
        """
        prompts, step, watch = self._start_step(prompts)
        with self._whole_weights(watch):
            responses = self._sample(prompts, step, watch)
            rollout = self._forward(prompts, responses, self._score(responses, watch), watch)
        experience = make_experience(rollout, self.config.ppo, self.config.reward, self.kl_controller.coef)
        fault = rollout_fault(rollout, step)
        first = None
        if step == 1 and fault is None:
            first = FirstStep.before_update(self.setup, responses, rollout, experience, self.run.warn)
        with watch("update"):
            losses = self.update(experience, step) if fault is None else self._skip_update(fault, experience)
            self.collector.engine.sync(self.runtime.trainable_weights)
        metrics = step_metrics(rollout, experience, losses, watch, self._of_the_run(step, len(rollout), losses))
        if first is not None:
            first.check(metrics, losses)
        self._adapt(metrics, len(rollout))
        return metrics

    def update(self, experience: Experience, step: int) -> LossStats:
        """PPO's epochs over the experience; stops early where ppo.target_kl_stop says so."""
        config = self.config.ppo
        totals = UpdateTotals(experience)
        with training_mode(self.runtime.module, self.config):
            for epoch in range(config.ppo_epochs):
                generator = np.random.default_rng((_MINIBATCHES, self.config.run.seed, step, epoch))
                order = generator.permutation(len(experience))
                for number, rows in enumerate(np.array_split(order, config.num_minibatches)):
                    fault = Fault(
                        step=step,
                        phase="update",
                        what="gradient",
                        rows=tuple(rows.tolist()),
                        where=f", epoch {epoch + 1}, minibatch {number + 1}",
                    )
                    if not self._update_minibatch(experience, torch.from_numpy(rows), totals, fault):
                        return totals.stats()
        return totals.stats()

    def _start_step(self, prompts: PromptBatch | Sequence[str]) -> tuple[PromptBatch, int, Stopwatch]:
        """The prompts of the step, a row for each response; the step's number; and a stopwatch for its phases."""
        self.prepare()
        prompts = checked_prompts(prompts, self.setup)
        step = self.progress.step + 1
        watch = Stopwatch(entering=lambda phase: self.run.recorder.heartbeat(f"{phase} of step {step}"))
        reseed(self.config.run.seed, step, self.runtime.rank, _STEP)
        self.runtime.set_lr_factor(lr_factor(self.config.optim, step, self.config.run.total_steps))
        return prompts, step, watch

    @contextmanager
    def _whole_weights(self, watch: Stopwatch) -> Iterator[None]:
        """With ZeRO-3, gather the weights for sampling and the passes after it, as rollout.gather_parameters says."""
        with ExitStack() as stack:
            with watch("rollout"):
                stack.enter_context(self.runtime.gathered())
            yield

    def _sample(self, prompts: PromptBatch, step: int, watch: Stopwatch) -> Responses:
        with watch("rollout"):
            responses = self.collector.sample(prompts, Seeds(self.config.run.seed, step))
        self.between()
        return responses

    def _score(self, responses: Responses, watch: Stopwatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Scores of this rank's responses, of their parts where reward.partial_every asks for them, and by each of
        several rewards."""
        with watch("score"):
            by_terms = score_terms(self.runtime, responses, self.reward)
            every, tokens = self.config.reward.partial_every, self.setup.tokens
            parts = score_parts(self.runtime, tokens, responses, self.reward, every, self.between)
        self.between()
        return self.reward.total(by_terms), parts, self.reward.by_name(by_terms)

    def _forward(
        self,
        prompts: PromptBatch,
        responses: Responses,
        scores: tuple[Tensor, Tensor, dict[str, Tensor]],
        watch: Stopwatch,
    ) -> Rollout:
        with watch("rollout"):
            rollout = self.collector.forward(prompts, responses, *scores)
        self.rollout, self.columns = rollout, prompts.columns
        self.between()
        return rollout

    def _skip_update(self, fault: Fault, experience: Experience) -> LossStats:
        totals = UpdateTotals(experience)
        totals.add_step(math.nan, taken=False)
        failures.skip(self.run, fault, experience)
        return totals.stats()

    def _update_minibatch(
        self, experience: Experience, rows: Int[Tensor, " n"], totals: UpdateTotals, fault: Fault
    ) -> bool:
        """One optimizer step; False if the policy had moved too far to take it. `fault` describes the step in case its
        gradient is not finite."""
        config, sequences = self.config.ppo, experience.sequences
        micro_batches = cut_micro_batches(
            sequences.query_mask.sum(1),
            sequences.response_mask.sum(1),
            rows,
            config.micro_batch_tokens,
            self.runtime.world_size,
        )
        # Over all ranks and micro-batches, and known before the first backward pass.
        mask = sequences.response_mask[rows]
        tokens, denominator = int(mask.sum()), ppo.denominator(mask, config.loss_reduction)
        noted: list[Terms] = []
        losses = [self._loss(experience, part, denominator, noted) for part in micro_batches[self.runtime.rank]]
        means: dict[str, Tensor] = {}

        def no_step() -> bool:
            """Whether the policy moved too far, or the loss is not finite, though its gradient may be."""
            means.update(totals.add_losses(Terms.added(noted).over(self.runtime.sum_and_max), tokens, denominator))
            too_far = config.target_kl_stop is not None and bool(means["approx_kl"] > config.target_kl_stop)
            return too_far or not means["total"].isfinite()

        norm, taken = math.nan, False
        if self.runtime.backward(losses, unless=no_step):
            norm, taken = self.runtime.optimizer_step()
        elif means["total"].isfinite():
            return False
        else:
            fault = replace(fault, what="loss")
        totals.add_step(norm, taken=taken)
        if taken:
            self.progress = replace(self.progress, skipped_in_a_row=0)
        else:
            failures.skip(self.run, fault, experience)
        return True

    def _loss(
        self, experience: Experience, rows: Int[Tensor, " m"], denominator: int, noted: list[Terms]
    ) -> Callable[[], Tensor]:
        """The loss of a micro-batch as a function, which also notes its terms.

        An empty micro-batch reads one row and counts no token of it: its passes keep this rank in step with the others.
        """
        part = experience.select(rows if len(rows) else torch.zeros(1, dtype=torch.int64)).trimmed()
        attended = mask_of(part.sequences.query_mask, part.sequences.response_mask)
        part = part.to(self.runtime.device)
        mask = part.sequences.response_mask & bool(len(rows))

        def loss() -> Tensor:
            with known_mask(attended, self.runtime.device):
                terms = computed_terms(self.runtime.module, part, mask, self.config.ppo, self.kl_controller.coef)
            noted.append(terms.detached())
            return terms.sums["total"] / denominator

        return loss

    def _of_the_run(self, step: int, samples: int, losses: LossStats) -> dict[str, float]:
        """The metrics of a step that depend on the run so far."""
        optim = self.config.optim
        return {
            "step": step,
            "episodes": self.progress.episodes + samples,
            "kl/coef": self.kl_controller.coef,
            "optim/lr": optim.lr * lr_factor(optim, step, self.config.run.total_steps),
            "optim/skipped_steps": self.progress.skipped + losses.skipped,
            "perf/peak_memory_mib": self.runtime.peak_memory_mib(),
        }

    def _adapt(self, metrics: Mapping[str, float], samples: int) -> None:
        """Adapt the KL coefficient, and note that the step is done."""
        if math.isfinite(metrics["objective/kl"]):
            self.kl_controller = self.kl_controller.updated(metrics["objective/kl"], samples)
        self.progress = replace(
            self.progress,
            step=int(metrics["step"]),
            episodes=int(metrics["episodes"]),
            skipped=int(metrics["optim/skipped_steps"]),
            kl_coef=self.kl_controller.coef,
        )

    def prepare(self) -> None:
        """Once, before the first step: resume from a checkpoint, or calibrate the reward of a new run."""
        if self._prepared:
            return
        self._prepared = True
        if self.run.resume_from is not None:
            self.progress = self.run.resumed(self.run.resume_from)
            self.kl_controller = kl_controller(self.config.ppo, self.progress.kl_coef)
            self.reward = replace(self.reward, mean=self.progress.reward_mean, std=self.progress.reward_std)
        elif self.config.reward.calibrate:
            count = self.config.reward.calibrate_samples
            self.run.line.say(f"calibrating the reward on {count} samples of the reference")
            self.reward = self.reward.calibrated(self._reference_scores(count))
            self.progress = replace(self.progress, reward_mean=self.reward.mean, reward_std=self.reward.std)

    def _reference_scores(self, count: int) -> Tensor:
        """Raw scores of the policy before training, on training prompts."""
        self.run.recorder.heartbeat("calibration")
        reseed(self.config.run.seed, _CALIBRATION_STEP, self.runtime.rank, _STEP)
        with self.runtime.gathered():
            seeds = Seeds(self.config.run.seed, _CALIBRATION_STEP)
            responses = self.collector.sample(self.setup.prompts.batch(1, count), seeds)
        return self.runtime.gather_rows(score(self.runtime, responses, replace(self.reward, clip=None)), count)


def checked_prompts(prompts: PromptBatch | Sequence[str], setup: Setup) -> PromptBatch:
    """The prompts of a step as a batch with a row for each response. Raises `ConfigError` as `PPOTrainer.step`."""
    rollout, minibatches = setup.config.rollout, setup.config.ppo.num_minibatches
    if not isinstance(prompts, PromptBatch):
        prompts = own_prompts(prompts, setup.tokens, setup.config.data)
    prompts = prompts.repeated(rollout.samples_per_prompt)
    policy, lengths = setup.runtime.plain_module.policy, prompts.query_mask.sum(1).tolist()
    check_prompts(policy, prompts.texts, lengths, rollout.max_new_tokens, "rollout.max_new_tokens")
    if len(prompts) < minibatches:
        raise ConfigError(
            f"ppo.num_minibatches={minibatches} is above this step's {len(prompts)} responses; lower it",
            key="ppo.num_minibatches",
        )
    return prompts


def kl_controller(config: PPOConfig, coef: float) -> FixedKLController | AdaptiveKLController:
    """The controller that ppo.kl_target asks for; an adaptive one starts from `coef`."""
    if config.kl_target is None:
        return FixedKLController(coef=config.kl_coef)
    return AdaptiveKLController(coef=coef, target=config.kl_target, horizon=config.kl_horizon)


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step counted from 1: rises over the warm-up, then follows the schedule.

    Raises `ConfigError` for a step beyond `total_steps`, unless the schedule is constant.

    >>> [lr_factor(OptimConfig(schedule="linear", warmup_steps=2), step, 6) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step > total_steps and optim.schedule != "constant":
        raise ConfigError(
            f"run.total_steps={total_steps} is below step {step}, for which optim.schedule={optim.schedule} has no "
            "learning rate; raise it, or set optim.schedule=constant",
            key="run.total_steps",
        )
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    done = (step - 1 - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
    if optim.schedule == "linear":
        return 1.0 - done
    return 1.0 if optim.schedule == "constant" else 0.5 * (1.0 + float(np.cos(np.pi * done)))
