"""PPO from human feedback: the step, the update and the run (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.advantages import make_experience
from rlhf_accel.algorithm.batches import Experience, LossStats, PromptBatch, Rollout
from rlhf_accel.config import places
from rlhf_accel.config.distribution import distribution, truncated
from rlhf_accel.config.rules import check_trainable
from rlhf_accel.config.schema import BatchSizes, Config, OptimConfig
from rlhf_accel.data import prompts as data
from rlhf_accel.data import wheels
from rlhf_accel.data.reward_texts import special_token
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.batching import cut_micro_batches
from rlhf_accel.distributed.liveness import is_lost_contact, missing, who_is_missing
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models import calls, loading, lora, policy_with_value, positions, probes
from rlhf_accel.models import policy as models
from rlhf_accel.models.reference import load_reference
from rlhf_accel.models.trainable import freeze_unreached, learning, parameter_groups
from rlhf_accel.reward import (
    Classifier,
    Reward,
    RewardError,
    RewardFunction,
    cautions,
    load_golds,
    load_reward,
    reward_of,
)
from rlhf_accel.rollout import padding
from rlhf_accel.rollout.scoring import WITHOUT_PARTS, FailedScoring, Sampler
from rlhf_accel.runs import checkpoint, hub
from rlhf_accel.runs.checkpoint import Progress, SaveError
from rlhf_accel.runs.exports import ExportError, ExportProbe
from rlhf_accel.runs.metrics import Progressline, Stopwatch
from rlhf_accel.runs.recorder import Keeper
from rlhf_accel.runs.report import page as report
from rlhf_accel.system.arithmetic import computes_in_bf16, product_arithmetic, product_error
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.process import reseed
from rlhf_accel.system.signals import STOPPED, StopRequest
from rlhf_accel.training.evaluation import Evaluation, compare, evaluate, first_samples, sample_pairs
from rlhf_accel.training.nonfinite import Fault, explain, rollout_fault

_MINIBATCHES = 4  # stream of random numbers, beside those of data.py
_CALIBRATION_STEP = 0  # training steps count from 1
_STEP, _EVALUATION = 0, 1  # global random numbers, by what draws them
_PROBED = 32  # prompts whose tokens are compared with the tokenizer's own
_LOOKED_AT = 16  # responses whose logits tell the limits of step 1
_LOOKED_AT_TOKENS = 32  # of a response that is drawn again
_READ = 64  # prompts, to see whether they hold special tokens
_SHOWN = 10  # held-out samples that the summary shows before and after

T = TypeVar("T")


class _Stop(Exception):
    """A signal asked the run to stop, and a phase has ended."""


class PPOTrainer:
    """A PPO run from a config, with a reward of its own or one passed as a callable.

    `fit()` does the whole run. `step(prompts)` does one step on prompts of your own and returns its metrics.
    Raises `ConfigError` for whatever cannot work, before anything is trained or written.
    """

    def __init__(self, config: Config, reward: RewardFunction | None = None) -> None:
        check_trainable(config)
        given, config = config, places.absolute(config)
        self.config = config
        self.sizes = BatchSizes.of(config)
        self.runtime = Runtime(
            config.run,
            max_grad_norm=config.optim.max_grad_norm,
            minibatch=self.sizes.minibatch,
            gather_parameters=config.rollout.gather_parameters,
        )
        if self.runtime.zero_stage == 3 and (config.lora.use_dora or config.model.load_in_4bit):
            key = "lora.use_dora" if config.lora.use_dora else "model.load_in_4bit"
            raise ConfigError(
                f"{key}=true does not work where ZeRO-3 cuts the base's weights; launch with ZeRO-2 or ddp", key=key
            )
        folder = self.runtime.from_main(lambda: checkpoint.choose_folder(config))
        self.line = Progressline(config.run.total_steps, enabled=self.runtime.is_main)
        self.keeper = Keeper(config, folder, self.runtime, self.line, given)
        self.runtime.from_main(self.keeper.claim)
        if config.run.push_to_hub is not None:
            self.runtime.from_main(lambda: hub.check(config))
        stage, size = self.runtime.zero_stage, self.runtime.world_size
        self.resume_from = self.runtime.from_main(
            lambda: checkpoint.resume_folder(config, self.folder, self.line.say, zero_stage=stage, world_size=size)
        )
        self.progress = Progress(kl_coef=config.ppo.kl_coef)
        self.rollout: Rollout | None = None  # of the last step
        self._columns: Mapping[str, Sequence[Any]] = {}  # of its prompts
        self._evaluation: Evaluation | None = None  # the last one
        self._stop = StopRequest()

        # What is quick to check comes first, what may be trained on first use comes last.
        train_rows, held_rows = self._on_main_first(lambda: data.split_rows(config.data))
        policy_path = self._on_main_first(lambda: wheels.resolve_model(config.model.name_or_path))
        self.tokens = Tokens.load(policy_path, trust_remote_code=config.model.trust_remote_code)
        self.tokens.stop_condition(config.rollout.stop)  # which raises what is wrong with it
        limit, seed = config.rollout.max_prompt_tokens, config.run.seed
        self.prompts = data.Prompts.of(train_rows, self.tokens, config.data, limit, seed)
        self.held_out = data.Prompts.of(held_rows, self.tokens, config.data, limit, seed) if len(held_rows) else None
        check_prompt_tokens(self.prompts)
        if self.held_out is None and config.run.eval_samples:
            self.line.say("no evaluation: no text of data.source falls into the tenth held out; set data.eval_split")

        policy = models.load_policy(config, policy_path, self.runtime.device)
        self.keeper.left_out = models.left_out(policy, config.model, policy_path)
        positions.check_window(config, policy, len(self.tokens.prefix))
        reference = load_reference(config, policy)
        reward_path = self._reward_path()
        self.reward = self._load_reward(reward, reward_path)
        self._check_turns()
        self.golds = self._on_main_first(lambda: load_golds(config.reward))
        self._try_reward()
        if self.runtime.zero_stage == 3:
            self._check_adapters(policy)
        module = self._build(policy, policy_path, reward_path)
        self._what_runs = self._describe(module)
        optim = config.optim
        groups = parameter_groups(module, optim)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        self.runtime.prepare(module, optimizer, self.resume_from)
        # On all ranks alike, whatever hardware each has: they have to run the same passes.
        own = self._rounds_to()
        found = [dtype for dtype in (torch.bfloat16, torch.float16) if self.runtime.anywhere(own == dtype)]
        self._dtype = (*found, torch.float32)[0]
        self._check_padding()
        self.sampler = Sampler(
            config=config.rollout,
            runtime=self.runtime,
            tokens=self.tokens,
            reference=None if reference is None else self.runtime.prepare_frozen(reference),
            pass_tokens=config.ppo.micro_batch_tokens,
            keeps_said=config.rollout.logprobs == "sampled"
            or (config.rollout.logprobs == "auto" and self._dtype == torch.float32),
            fast_kernels=config.run.fast_kernels,
        )
        self.kl_controller = self._kl_controller()
        self._export_probe = ExportProbe(config, self.runtime.device, (self.held_out or self.prompts).fixed(16))
        self._prepared = False

    @property
    def folder(self) -> Path:
        """The run's; of a default folder it is known once training has begun, for another run may take it before."""
        return self.keeper.folder

    def fit(self) -> dict[str, Any]:
        """Calibrate, evaluate, train, evaluate, export. Returns what `summary.json` holds.

        SIGTERM and SIGUSR1 end it with a checkpoint and `SystemExit` 143. Raises `RunFailed` when it cannot go on.
        """
        with StopRequest() as self._stop:
            try:
                self.line.say(f"run folder {self.folder}\n{self._what_runs}\n{self.keeper.products.message}")
                if self.keeper.left_out is not None:
                    self.line.say(f"note: {self.keeper.left_out}")
                self._warn_of_emulation()
                self._warn_of_truncation()
                for _, said in self.cautions():
                    self.line.say(f"warning: {said}")
                self._prepare()
                self.keeper.open(self.progress, self.resume_from)
                return self._train()
            except _Stop:
                raise self._stopped() from None
            except FailedScoring as error:
                raise self._gave_up_scoring(error) from error
            except KeyboardInterrupt:
                raise self._interrupted() from None
            except RunFailed:
                raise
            except RuntimeError as error:
                if self.runtime.world_size > 1 and is_lost_contact(error):
                    found = who_is_missing(self.runtime.rank, self.keeper.heartbeat, missing())
                    raise RunFailed(f"{found} ({str(error).splitlines()[0]}); {self.keeper.how_to_go_on()}") from error
                raise
            finally:
                self.keeper.close()

    def _train(self) -> dict[str, Any]:
        if self.progress.step == 0 and self.progress.base is None:
            base = self._evaluate()
            if base is not None:
                self.progress = replace(
                    self.progress,
                    base=base.figures,
                    base_scores=base.rollout.scores.tolist(),
                    base_samples=first_samples(base, _SHOWN),
                )
            self._stop_if_asked()
        total = self.config.run.total_steps
        with self.line:
            self._conclude()
            for step in range(self.progress.step + 1, total + 1):
                metrics = self.step(self.prompts.batch(step, self.sizes.rollout))
                if step == 1 or _due(step, self.config.run.sample_every):
                    self._log_samples(step)
                self.progress = replace(self.progress, unrecorded=metrics)
                if self._evaluates_after(step):
                    self._stop_if_asked()
                self._conclude()
                self._stop_if_asked()
        return self._finish()

    def _conclude(self) -> None:
        """What follows a step, now or when the run goes on: evaluate, record, save, as far as they are due."""
        metrics = self.progress.unrecorded
        if metrics is None:
            return
        step = int(metrics["step"])
        if self._evaluates_after(step):
            self._evaluation = self._evaluate()
            if self._evaluation is not None:
                metrics = metrics | self._evaluation.metrics()
                self._keep_best(self._evaluation)
        self.progress = replace(self.progress, unrecorded=None)
        self.keeper.record(metrics)
        if _due(step, self.config.run.save_every):
            self.keeper.save(self.progress)

    def step(self, prompts: PromptBatch | Sequence[str]) -> dict[str, float]:
        """One PPO step: sample, score, learn. Returns the step's metrics, the same on every rank.

        Raises `ConfigError` naming the first prompt that has no text or, with its response, too many positions.
        """
        self._prepare()
        if not isinstance(prompts, PromptBatch):
            prompts = data.own_prompts(prompts, self.tokens)
        policy, new_tokens = self.runtime.plain_module.policy, self.config.rollout.max_new_tokens
        lengths = prompts.query_mask.sum(1).tolist()
        positions.check_prompts(policy, prompts.texts, lengths, new_tokens, "rollout.max_new_tokens")
        minibatches = self.config.ppo.num_minibatches
        if len(prompts) < minibatches:
            raise ConfigError(
                f"ppo.num_minibatches={minibatches} is above this step's {len(prompts)} prompts; lower it",
                key="ppo.num_minibatches",
            )
        step = self.progress.step + 1
        watch = Stopwatch(entering=lambda phase: self.keeper.heartbeat(f"{phase} of step {step}"))
        reseed(self.config.run.seed, step, self.runtime.rank, _STEP)
        self.runtime.set_lr_factor(lr_factor(self.config.optim, step, self.config.run.total_steps))
        rollout = self.rollout = self.sampler.rollout(
            prompts,
            self.reward,
            seed=self.config.run.seed,
            step=step,
            watch=watch,
            between=self._stop_if_asked,
            partial_every=self.config.reward.partial_every,
        )
        self._columns = prompts.columns
        self._stop_if_asked()
        experience = make_experience(rollout, self.config.ppo, self.config.reward, self.kl_controller.coef)
        fault = rollout_fault(rollout, step)
        limits = None
        if step == 1 and fault is None:
            limits = self._first_limits(rollout)
            if not self.sampler.keeps_said:
                self._warn_of_sampling(prompts, rollout, limits[0])
            self._warn_of_values(experience)
        with watch("update"):
            losses = self.update(experience, step) if fault is None else self._learn_nothing(fault, experience)
        metrics = self._metrics(step, rollout, experience, losses, watch)
        if limits is not None:
            self._check_first_step(metrics, losses, *limits)
        if math.isfinite(metrics["objective/kl"]):
            self.kl_controller = self.kl_controller.updated(metrics["objective/kl"], len(rollout))
        self.progress = replace(
            self.progress,
            step=step,
            episodes=int(metrics["episodes"]),
            skipped=int(metrics["optim/skipped_steps"]),
            kl_coef=self.kl_controller.coef,
        )
        return metrics

    def update(self, experience: Experience, step: int) -> LossStats:
        """PPO's epochs over the experience; stops early where ppo.target_kl_stop says so."""
        config = self.config.ppo
        totals = _UpdateTotals()
        with learning(self.runtime.module, self.config):
            for epoch in range(config.ppo_epochs):
                order = np.random.default_rng((_MINIBATCHES, self.config.run.seed, step, epoch)).permutation(
                    len(experience)
                )
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

    def _learn_nothing(self, fault: Fault, experience: Experience) -> LossStats:
        totals = _UpdateTotals()
        totals.add_step(math.nan, taken=False)
        self._skip(fault, experience)
        return totals.stats()

    def _update_minibatch(
        self, experience: Experience, rows: Int[Tensor, " n"], totals: _UpdateTotals, fault: Fault
    ) -> bool:
        """One optimizer step; False if the policy had moved too far to take it. `fault` is what it would be called if
        its gradient were not finite."""
        config = self.config.ppo
        sequences = experience.sequences
        micro_batches = cut_micro_batches(
            sequences.query_mask.sum(1),
            sequences.response_mask.sum(1),
            rows,
            config.micro_batch_tokens,
            self.runtime.world_size,
        )
        # Over all ranks and micro-batches, and known before the first backward pass.
        tokens = int(sequences.response_mask[rows].sum())
        sums: list[Tensor] = []
        maxima: list[Tensor] = []
        losses = [self._loss(experience, part, tokens, sums, maxima) for part in micro_batches[self.runtime.rank]]

        def no_step() -> bool:
            """It moved too far, or the loss is not finite, though its gradient may be."""
            means = self.runtime.sum(torch.stack(sums).sum(0)) / tokens
            totals.add_losses(means, self.runtime.max(torch.stack(maxima).amax(0)))
            too_far = config.target_kl_stop is not None and bool(means[3] > config.target_kl_stop)
            return too_far or not means[2].isfinite()

        norm, taken = math.nan, False
        if self.runtime.backward(losses, unless=no_step):
            norm, taken = self.runtime.optimizer_step()
        elif totals.means[-1][2].isfinite():
            return False
        else:
            fault = replace(fault, what="loss")
        totals.add_step(norm, taken)
        if taken:
            self.progress = replace(self.progress, skipped_in_a_row=0)
        else:
            self._skip(fault, experience)
        return True

    def _loss(
        self, experience: Experience, rows: Int[Tensor, " m"], tokens: int, sums: list[Tensor], maxima: list[Tensor]
    ) -> Callable[[], Tensor]:
        """The loss of a micro-batch as a function, which also notes its statistics.

        An empty micro-batch reads one row with nothing of it counted: its passes keep the rank in step with others.
        """
        config, device = self.config.ppo, self.runtime.device
        part = experience.select(rows if len(rows) else torch.zeros(1, dtype=torch.int64)).to(device)
        sequences = part.sequences.trimmed()
        mask = sequences.response_mask & bool(len(rows))
        length = mask.shape[1]

        def loss() -> Tensor:
            new = self.runtime.module(*calls.model_inputs(sequences), with_entropy=config.entropy_coef > 0)
            policy = ppo.policy_loss(
                new.logprobs, part.old_logprobs[:, :length], part.advantages[:, :length], mask, config.cliprange
            )
            value = ppo.value_loss(
                new.values, part.old_values[:, :length], part.returns[:, :length], mask, config.cliprange_value
            )
            total = policy.loss + config.vf_coef * value.loss
            if new.entropy is not None:
                total = total - config.entropy_coef * ppo.masked_sum(new.entropy, mask)
            noted = (policy.loss, value.loss, total, policy.approx_kl, policy.clipped, value.clipped)
            sums.append(torch.stack([figure.detach().float().cpu() for figure in noted]))
            maxima.append(torch.stack([policy.ratio_max, policy.ratio_error, policy.log_ratio_error]).float().cpu())
            return total / tokens

        return loss

    def loss_of(self, experience: Experience) -> Tensor:
        """The loss of a few samples as one micro-batch, for a look at it; nothing is learnt."""
        rows = torch.arange(len(experience))
        return self._loss(experience, rows, int(experience.sequences.response_mask.sum()), [], [])()

    def _metrics(
        self, step: int, rollout: Rollout, experience: Experience, losses: LossStats, watch: Stopwatch
    ) -> dict[str, float]:
        mask, partial = rollout.sequences.response_mask, rollout.partial_scores
        k1, k3 = (
            ppo.masked_row_sum(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind), mask).mean()
            for kind in ("k1", "k3")
        )
        return {
            "step": step,
            "episodes": self.progress.episodes + len(rollout),
            "objective/score": float(rollout.scores.mean()),
            "objective/score_std": float(rollout.scores.std(correction=0)),
            "objective/reward": float(ppo.masked_row_sum(experience.rewards, mask).mean()),
            "objective/kl": float(k1),
            "objective/kl_k3": float(k3),
            "objective/entropy": float(ppo.masked_mean(rollout.entropy, mask)),
            "kl/coef": self.kl_controller.coef,
            "loss/policy": losses.policy,
            "loss/value": losses.value,
            "loss/total": losses.total,
            "policy/approx_kl": losses.approx_kl,
            "policy/clip_fraction": losses.clip_fraction,
            "policy/ratio_max": losses.ratio_max,
            "policy/first_ratio_error": losses.first_ratio_error,
            "value/clip_fraction": losses.value_clip_fraction,
            "value/explained_variance": float(
                ppo.explained_variance(rollout.values + partial, experience.returns + partial, mask)
            ),
            "rollout/response_tokens": float(mask.sum(1).float().mean()),
            "rollout/eos_fraction": float(rollout.finished.float().mean()),
            "optim/lr": self.config.optim.lr * lr_factor(self.config.optim, step, self.config.run.total_steps),
            "optim/grad_norm": losses.grad_norm,
            "optim/skipped_steps": self.progress.skipped + losses.skipped,
            "time/rollout": watch.seconds["rollout"],
            "time/score": watch.seconds["score"],
            "time/update": watch.seconds["update"],
            "time/step": watch.total(),
            "perf/samples_per_second": len(rollout) / watch.total(),
            "perf/response_tokens_per_second": int(mask.sum()) / watch.total(),
            "perf/peak_memory_mib": self.runtime.peak_memory_mib(),
        }

    def ratio_limits(self, rollout: Rollout, *, of_one_pass: bool = False) -> probes.RatioLimits:
        """What rounding explains of the first log-ratios, from the logits of a few responses; `of_one_pass` where both
        sides come from passes of the same shape, which round alike. Called by all ranks."""
        if self._dtype == torch.float32 or of_one_pass:
            return probes.ratio_limits(None, self._dtype)
        most = max(self.config.ppo.micro_batch_tokens // int(rollout.sequences.lengths.max()), 1)
        few = rollout.sequences.select(torch.arange(min(_LOOKED_AT, most, len(rollout)))).trimmed()
        with self.runtime.gathered(), self.runtime.autocast():
            sizes = policy_with_value.logit_sizes(self.runtime.plain_module, few.to(self.runtime.device))
        spacing = probes.logit_spacing(sizes, self._dtype) / self.config.rollout.temperature
        return probes.ratio_limits(spacing, self._dtype)

    def _first_limits(self, rollout: Rollout) -> tuple[probes.RatioLimits, probes.RatioLimits]:
        """Of log-ratios to the rollout's probabilities and to the reference's. Asked for before the update: after it,
        logits are others."""
        return self.ratio_limits(rollout), self.ratio_limits(rollout, of_one_pass=not self.sampler.keeps_said)

    @torch.no_grad()
    def _warn_of_sampling(self, prompts: PromptBatch, rollout: Rollout, limits: probes.RatioLimits) -> None:
        """Where log-probabilities are recomputed, the ratio is 1 whatever sampling does: so a few responses are drawn
        again, and sampling's own log-probabilities are compared with those of a pass over them. Called by all ranks."""
        config, ranks = self.config.rollout, self.runtime.world_size
        length = min(config.max_new_tokens, _LOOKED_AT_TOKENS)
        of_rank = max(self.config.ppo.micro_batch_tokens // (prompts.queries.shape[1] + length), 1)
        few = prompts.select(torch.arange(min(max(_LOOKED_AT, ranks), of_rank * ranks, len(prompts))))
        shorter = replace(config, max_new_tokens=length, min_new_tokens=min(config.min_new_tokens, length))
        with self.runtime.gathered():
            drawn = replace(self.sampler, config=shorter).sample(few, seed=self.config.run.seed, step=1)
            # A rank without a share reads a row that is not counted: the pass may be a collective.
            chunk = drawn.sequences if len(drawn) else rollout.sequences.select(torch.tensor([0]))
            with self.runtime.autocast():
                passed = self.runtime.plain_module(*calls.model_inputs(chunk.to(self.runtime.device)))
        mask = drawn.sequences.response_mask
        off = (passed.logprobs.float().cpu()[: len(drawn), : mask.shape[1]] - drawn.logprobs)[mask].double()
        total, count = self.runtime.sum(torch.stack([off.square().sum(), torch.tensor(float(off.numel()))])).tolist()
        largest = float(self.runtime.max(torch.cat([off.new_zeros(1), off.abs()]).amax()[None])[0])
        finding = probes.sampled_is_learnt(math.sqrt(total / max(count, 1.0)), largest, limits, recomputed=True)
        if not finding.passed:
            self.line.say(
                f"warning: responses are drawn from another distribution than the one that learns; {finding.message}"
            )

    def _check_first_step(
        self,
        metrics: Mapping[str, float],
        losses: LossStats,
        ratios: probes.RatioLimits,
        references: probes.RatioLimits,
    ) -> None:
        """At step 1 policy and reference are the same model, and so are the sampling and the current policy."""
        found = {}
        rms, largest = losses.first_log_ratio_rms, losses.first_log_ratio_max
        if self.config.lora.dropout == 0 and math.isfinite(rms):  # else no minibatch had a finite loss, and was skipped
            recomputed = not self.sampler.keeps_said
            found["policy/first_ratio_error"] = probes.sampled_is_learnt(rms, largest, ratios, recomputed=recomputed)
        kl, tokens = metrics["objective/kl_k3"], metrics["rollout/response_tokens"]
        found["objective/kl_k3"] = probes.reference_is_policy(kl, tokens, references)
        for metric, finding in found.items():
            if not finding.passed:
                raise RunFailed(f"{metric} is {metrics[metric]:.4g} at step 1: {finding.message}")

    def _build(
        self, policy: loading.LanguageModel, policy_path: str, reward_path: str | None
    ) -> policy_with_value.PolicyWithValue:
        """The module, of which learns what text reaches; the rest is noted as frozen. Raises `ConfigError`."""
        try:
            module = policy_with_value.build(self.config, policy, policy_path, reward_path)
            self._frozen = freeze_unreached(module)
        except ConfigError:
            raise
        except Exception as error:  # models are many, and this is the first pass
            said = f"model.name_or_path={self.config.model.name_or_path}: {padding.cannot_run(error)}"
            raise ConfigError(f"{said}", key="model.name_or_path") from error
        return module

    def _check_adapters(self, policy: loading.LanguageModel) -> None:
        """Raises `ConfigError` if ZeRO-3 would cut a tensor that an adapter has to be added to."""
        name = lora.on_tensors(policy)
        if name is not None:
            targets = list(self.config.lora.target_modules or ())
            raise ConfigError(
                f"lora.target_modules={targets}: puts an adapter on the experts' tensors ({name}), which ZeRO-3 cuts; "
                "name layers of attention, leave the key out, or launch with ZeRO-2 or ddp",
                key="lora.target_modules",
            )

    def _check_padding(self) -> None:
        """Raises `ConfigError` on every rank if policy or critic compute something else in a padded batch than alone,
        or cannot be run at all; with ZeRO-3 each pass is a collective. A classifier is checked where it is loaded."""
        self._check_policy(self.prompts.fixed(3))

    def _check_policy(self, few: PromptBatch) -> None:
        batch = padding.made_up(few.queries[few.query_mask], self.tokens.pad_id).to(self.runtime.device)
        module, dtype = self.runtime.plain_module, self._dtype
        looks = [
            lambda: padding.policy_alone(module.policy, batch, dtype),
            lambda: padding.sampled_is_recomputed(module.policy, batch, self.tokens.pad_id, dtype),
        ]
        if not module.critic_reads_policy:
            looks.append(lambda: padding.critic_alone(module, batch, dtype))
        for look in looks:
            with self.runtime.autocast():
                problem = self.runtime.first_failure(padding.problem(look))
            if problem is not None:
                named = f"model.name_or_path={self.config.model.name_or_path}"
                raise ConfigError(f"{named}: {problem}", key="model.name_or_path")

    def _rounds_to(self) -> torch.dtype:
        """The coarsest arithmetic on the policy's way to a log-probability, so fp32 if two ways agree up to its
        rounding; fp16 also stands for TF32, which has as many bits."""
        own = models.resolve_dtype(self.config, self.runtime.device)
        products = product_arithmetic(product_error(self.runtime.device))
        if "bf16" in (self.runtime.precision, products) or own == torch.bfloat16 or self.config.model.load_in_4bit:
            return torch.bfloat16
        return torch.float16 if products == "TF32" or own == torch.float16 else torch.float32

    def _reward_path(self) -> str | None:
        name = self.config.reward.model
        return None if name is None else self._on_main_first(lambda: wheels.resolve_model(name, "reward.model"))

    def _load_reward(self, reward: RewardFunction | None, path: str | None) -> Reward:
        if reward is None:
            settings, rollout, device = self.config.reward, self.config.rollout, self.runtime.device
            trusted = self.config.model.trust_remote_code
            sizes = (rollout.max_prompt_tokens, rollout.max_new_tokens)
            return self._on_main_first(
                lambda: load_reward(settings, path, device, trust_remote_code=trusted, sample_tokens=sizes)
            )
        if self.config.reward.model or self.config.reward.url or self.config.reward.function:
            raise ConfigError(
                "PPOTrainer(reward=…) is given beside reward.model, reward.url or reward.function; keep one of them",
                key="reward.function",
            )
        name = f"reward={getattr(reward, '__name__', type(reward).__name__)}"
        return reward_of(self.config.reward, ((name, 1.0, reward),))

    def cautions(self) -> list[tuple[str, str]]:
        """What a run should know of the texts that its reward reads: (what was looked at, one line) for each."""
        rollout = self.config.rollout
        return cautions(self.reward, rollout.max_prompt_tokens, rollout.max_new_tokens)

    def _check_turns(self) -> None:
        """Raises `ConfigError` where prompts that a classifier would read as a user's turn are laid out themselves."""
        for name, _, term in self.reward.terms:
            if not isinstance(term, Classifier) or not term.reads_prompts_as_turns:
                continue
            few = self.prompts.fixed(_READ)
            rows = [ids[mask].tolist() for ids, mask in zip(few.queries, few.query_mask, strict=True)]
            marker = special_token(self.tokens.tokenizer, rows)
            if marker is not None:
                raise ConfigError(
                    f"{name} reads conversations, and prompts of data.source={self.config.data.source} hold special "
                    f"tokens such as {marker}, which do not reach it; name the column with the plain prompt, or the "
                    "conversation, in reward.chat_field",
                    key="reward.chat_field",
                    marker=marker,
                )

    def _cut_texts(self) -> dict[str, dict[str, int]]:
        """For each classifier that had to cut texts in this process's share or another's, how many; says so, too."""
        found = {}
        for name, _, term in self.reward.terms:
            if isinstance(term, Classifier):
                counts = torch.tensor([term.read, term.cut, term.unread])
                read, cut, unread = self.runtime.sum(counts).tolist()
                if cut:
                    found[name] = {"read": read, "cut": cut, "unread": unread}
                    nothing = f", of {unread} it read nothing of the response" if unread else ""
                    self.line.say(
                        f"warning: {name} cut {cut} of {read} texts ({cut / read:.1%}) to the {term.max_tokens} tokens "
                        f"that it reads{nothing}"
                    )
        return found

    def _try_reward(self) -> None:
        """Score a few prompts as they are, and with empty responses if parts of these will be scored, so that a reward
        that cannot work fails before training."""
        few = self.prompts.fixed(2)
        try:
            for reward in (self.reward, *self.golds.values()):
                reward.try_out(few.texts, few.texts, few.columns)
        except RewardError as error:
            raise ConfigError(str(error), key=error.key, **error.facts) from error
        every = self.config.reward.partial_every
        if every:
            try:
                replace(self.reward, retries=0)(few.texts, [""] * len(few), few.columns)
            except RewardError as error:
                raise ConfigError(
                    f"{error}; with reward.partial_every={every} it is also asked about prompts with an empty response"
                    f": let it score these, or {WITHOUT_PARTS}",
                    key="reward.partial_every",
                    **error.facts,
                ) from error

    def _kl_controller(self) -> ppo.FixedKLController | ppo.AdaptiveKLController:
        config = self.config.ppo
        if config.kl_target is None:
            return ppo.FixedKLController(coef=config.kl_coef)
        return ppo.AdaptiveKLController(coef=self.progress.kl_coef, target=config.kl_target, horizon=config.kl_horizon)

    def _prepare(self) -> None:
        """Once, before the first step: go on from a checkpoint, or calibrate the reward for a new run."""
        if self._prepared:
            return
        self._prepared = True
        if self.resume_from is not None:
            self._resume(self.resume_from)
        elif self.config.reward.calibrate:
            self.line.say(f"calibrating the reward on {self.config.reward.calibrate_samples} samples of the reference")
            self.reward = self.reward.calibrated(self._reference_scores(self.config.reward.calibrate_samples))
            self.progress = replace(self.progress, reward_mean=self.reward.mean, reward_std=self.reward.std)

    def _reference_scores(self, count: int) -> Tensor:
        """Raw scores of the policy before training, on training prompts."""
        self.keeper.heartbeat("calibration")
        reseed(self.config.run.seed, _CALIBRATION_STEP, self.runtime.rank, _STEP)
        prompts = self.prompts.batch(1, count)
        with self.runtime.gathered():
            responses = self.sampler.sample(prompts, seed=self.config.run.seed, step=_CALIBRATION_STEP)
        return self.runtime.gather_rows(self.sampler.score(responses, replace(self.reward, clip=None)), count)

    def _evaluate(self) -> Evaluation | None:
        if self.held_out is None or self.config.run.eval_samples == 0:
            return None
        prompts = self.held_out.fixed(self.config.run.eval_samples)
        self.line.say(f"evaluating on {len(prompts)} held-out prompts")
        self.keeper.heartbeat(f"evaluation after step {self.progress.step}")
        reseed(self.config.run.seed, self.progress.step, self.runtime.rank, _EVALUATION)
        scores = self.progress.base_scores
        # run.changes may have let a run that goes on evaluate on more or fewer prompts.
        base = torch.tensor(scores)[:, None] if scores is not None and len(scores) == len(prompts) else None
        return evaluate(self.sampler, self.reward, prompts, golds=self.golds, base=base, say=self.line.say)

    def _evaluates_after(self, step: int) -> bool:
        return _due(step, self.config.run.eval_every) or step == self.config.run.total_steps

    def _keep_best(self, evaluation: Evaluation) -> None:
        best, budget = self.progress.best_score, self.config.run.best_kl_budget
        score, kl = evaluation.figures["score"], evaluation.figures["kl"]
        if not math.isfinite(score) or (best is not None and score <= best):
            return
        if budget is not None and not kl <= budget:
            return
        drawn_from = distribution(self.config.rollout)
        results = {"steps": self.progress.step, "sampling": drawn_from, **compare(self.progress.base, evaluation)}
        try:
            self.keeper.export("best", results, self.tokens, self._export_probe)
        except SaveError as error:
            self.line.say(f"warning: best/ could not be written: {error}")
        except ExportError as error:  # and so would be all that follow
            raise self._saved_and_failed(str(error)) from error
        else:
            self.progress = replace(self.progress, best_score=score, best_kl=kl, best_step=self.progress.step)

    def _log_samples(self, step: int) -> None:
        if self.rollout is not None and self.config.run.sample_every:
            self.keeper.samples(step, logged_samples(self.rollout, self.config.run.sample_count))

    def _stop_if_asked(self) -> None:
        """Between phases, on all ranks together if any was asked."""
        if self.runtime.anywhere(self._stop.received is not None):
            raise _Stop

    def _stopped(self) -> SystemExit:
        saved = self.keeper.save(self.progress)
        self.line.say(
            f"stopped by {self._stop.received or 'a signal to another process'} after step {self.progress.step} of "
            f"{self.config.run.total_steps}; {self.keeper.how_to_go_on()}"
        )
        return SystemExit(STOPPED if saved else 1)

    def _interrupted(self) -> BaseException:
        """By Ctrl-C, which waits for nobody: what is said and how to go on, on the main process."""
        if not self.runtime.is_main:
            return SystemExit(130)
        where = f"{self.keeper.heartbeat.now} (of {self.config.run.total_steps})"
        return KeyboardInterrupt(f"stopped by Ctrl-C in {where}; {self.keeper.how_to_go_on()}")

    def _gave_up_scoring(self, error: FailedScoring) -> RunFailed:
        """What stops the run, after a checkpoint and the inputs that the reward failed on were written."""
        if not self.keeper.is_open:  # while calibrating: nothing was learnt, and nothing is left behind
            return RunFailed(str(error))
        evaluating = self.progress.unrecorded is not None
        facts = {
            "phase": "score",
            "step": self.progress.step + (not evaluating),
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error.__cause__ or error)),
            "rows": [],
            "arithmetic": self.arithmetic(),
            **error.inputs,
        }
        place = self.keeper.dump(facts, None)
        raised = error.__cause__.__cause__ if error.__cause__ is not None else None
        frames = traceback.extract_tb(raised.__traceback__) if raised is not None else []
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return self._saved_and_failed(f"{error}{where}; look with python -m rlhf_accel replay {place}")

    def _saved_and_failed(self, said: str) -> RunFailed:
        """What ends the run between two steps, after a checkpoint; with how to go on."""
        try:
            self.keeper.save(self.progress)
        except RunFailed as unsaved:
            return RunFailed(f"{said}; {unsaved}")
        return RunFailed(f"{said}; {self.keeper.how_to_go_on()}")

    def _skip(self, fault: Fault, experience: Experience) -> None:
        """Count a step that is not taken and say why; raises `RunFailed` if it is one too many in a row."""
        count, most = self.progress.skipped_in_a_row + 1, self.config.run.max_skipped_steps
        self.progress = replace(self.progress, skipped_in_a_row=count)
        said = explain(fault, self.rollout)
        self.line.say(f"warning: {said}; skipped, {count} in a row of run.max_skipped_steps={most}")
        if count < most:
            return
        said += f"; {count} steps in a row were skipped (run.max_skipped_steps)"
        if not self.keeper.is_open:  # step() was called by itself, which writes nothing
            raise RunFailed(said)
        facts: dict[str, Any] = {**asdict(fault), "message": said, "arithmetic": self.arithmetic()}
        if self.rollout is not None:
            facts |= {"prompts": self.rollout.prompts, "responses": self.rollout.texts}
            facts |= {"scores": self.rollout.scores.tolist(), "columns": self._columns}
        place = self.keeper.dump(facts, experience)
        said += f"; look with python -m rlhf_accel replay {place}"
        if fault.phase == "update":  # a step that is half taken cannot be gone on with
            raise RunFailed(f"{said}; {self.keeper.how_to_go_on()}")
        raise self._saved_and_failed(said)

    def _resume(self, place: Path) -> None:
        self.progress = checkpoint.load_progress(place)
        if not self.runtime.from_main((self.folder / "best").is_dir):  # another run's best, in another folder
            self.progress = replace(self.progress, best_score=None, best_kl=None, best_step=None)
        self._forget_a_best_beyond_the_budget()
        if self.progress.base is not None and self.progress.base_scores is None:
            self.line.say(f"{place} holds no scores of the base: evaluations are without eval/win_rate")
        self.kl_controller = self._kl_controller()
        self.reward = replace(self.reward, mean=self.progress.reward_mean, std=self.progress.reward_std)
        self.line.say(f"going on after step {self.progress.step} from {place}")

    def _forget_a_best_beyond_the_budget(self) -> None:
        """Of a run that goes on with another run.best_kl_budget: its best/ stays until an evaluation is within it."""
        budget, kl = self.config.run.best_kl_budget, self.progress.best_kl
        if budget is None or self.progress.best_score is None or (kl is not None and kl <= budget):
            return
        found = "an unknown KL" if kl is None else f"a KL of {kl:.2f} nats"
        self.line.say(f"best/ has {found}, beyond run.best_kl_budget={budget:g}: the next within it takes its place")
        self.progress = replace(self.progress, best_score=None, best_kl=None, best_step=None)

    def _finish(self) -> dict[str, Any]:
        """Export the policy and write what the run did to the held-out score."""
        last = self._evaluation or self._evaluate()
        summary: dict[str, Any] = {
            "steps": self.progress.step,
            "seconds": self.keeper.seconds(self.progress),
            "calibration": {"mean": self.reward.mean, "std": self.reward.std},
            "sampling": distribution(self.config.rollout),
        }
        if last is not None and self.progress.base is not None:
            summary |= compare(self.progress.base, last)
            summary["samples"] = sample_pairs(self.progress.base_samples or [], last)
        best = self.progress
        if best.best_score is not None:
            summary["best"] = {"step": best.best_step, "score": best.best_score, "kl": best.best_kl}
        if last is not None and best.best_score is None and self.config.run.best_kl_budget is not None:
            budget = self.config.run.best_kl_budget
            self.line.say(f"warning: no evaluation was within run.best_kl_budget={budget:g}: best/ is not written")
        cut = self._cut_texts()
        if cut:
            summary["cut_texts"] = cut
        try:
            self.keeper.finish(summary, self.tokens, self._export_probe)
        except ExportError as error:
            raise self._saved_and_failed(str(error)) from error
        if self.config.run.report and self.runtime.is_main:
            report.after_training(self.folder, self.line.say)
        return summary

    def arithmetic(self) -> dict[str, str]:
        """What `auto` became on this device, for a dump to be run again in the same way."""
        names = {dtype: name for name, dtype in loading.DTYPES.items()}
        found = {
            "device": self.runtime.device.type,
            "precision": self.runtime.precision,
            "model_dtype": names[models.resolve_dtype(self.config, self.runtime.device)],
        }
        for _, _, term in self.reward.terms:
            if isinstance(term, Classifier):
                found["reward_dtype"] = names[term.dtype]
        return found

    def _describe(self, module: policy_with_value.PolicyWithValue) -> str:
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        held = sum(p.numel() for p in module.parameters())
        dtype = str(models.resolve_dtype(self.config, self.runtime.device)).removeprefix("torch.")
        said = (
            f"policy {self.config.model.name_or_path} in {dtype}, {trainable:,} of {held:,} parameters learn; critic "
            f"{self.config.model.critic}; {self.runtime.world_size} process(es) on {self.runtime.device.type} in "
            f"{self.runtime.precision}; {len(self.prompts)} prompts to train on; scored by "
            + " + ".join(name for name, _, _ in self.reward.terms)
        )
        return "\n".join([said, *self._notes_on(module)])

    def _notes_on(self, module: policy_with_value.PolicyWithValue) -> list[str]:
        """What was chosen for this family and not by the config."""
        notes = []
        if self._frozen:
            parts = sorted({".".join(name.split(".")[1:4]) for name in self._frozen})
            notes.append(
                f"{len(self._frozen)} tensors stay frozen, since no text reaches them ({', '.join(parts[:3])})"
            )
        settings, family = self.config.lora, str(module.policy.config.model_type)
        if settings.r and settings.target_modules is None and settings.adapter is None and not lora.knows(family):
            notes.append(f"adapters on all linear layers but experts and routers: peft has no default for {family}")
        return notes

    def _warn_of_emulation(self) -> None:
        asked = {"run.precision": self.config.run.precision, "model.dtype": self.config.model.dtype}
        keys = [key for key, dtype in asked.items() if dtype == "bf16"]
        if keys and not computes_in_bf16(self.runtime.device):
            said = " and ".join(f"{key}=bf16" for key in keys)
            self.line.say(f"warning: {said}: this device only emulates bf16, which takes many times longer than fp32")

    def _warn_of_truncation(self) -> None:
        said = truncated(self.config.rollout)
        if said is not None:
            self.line.say(
                f"warning: {said}; so are the penalty, ppo.kl_target, eval/kl and run.best_kl_budget, which follow it. "
                f"The policy's own: python -m rlhf_accel evaluate {self.folder} --rollout.top_k 0 --rollout.top_p 1"
            )

    def _warn_of_values(self, experience: Experience) -> None:
        """At step 1, whose returns are the first that are known."""
        finding = values_in_reach(experience, self.config.ppo.cliprange_value)
        if not finding.passed:
            self.line.say(f"warning: {finding.message}")

    def _on_main_first(self, make: Callable[[], T]) -> T:
        with self.runtime.main_first():
            return make()


class _UpdateTotals:
    """Sums up the statistics of a step's minibatches, each of which is already a mean over its tokens.

    The minibatch at which ppo.target_kl_stop ended the update counts: its losses were seen, though no step was taken.
    """

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.maxima: list[Tensor] = []
        self.norms: list[float] = []
        self.skipped = 0

    def add_losses(self, means: Tensor, maxima: Tensor) -> None:
        self.means.append(means)
        self.maxima.append(maxima)

    def add_step(self, norm: float, taken: bool) -> None:
        self.skipped += not taken
        if taken:
            self.norms.append(norm)

    def stats(self) -> LossStats:
        # What was not finite was skipped and counted; the others say how the update went.
        taken = [number for number, means in enumerate(self.means) if means.isfinite().all()]
        means = torch.stack([self.means[number] for number in taken]) if taken else torch.full((1, 6), torch.nan)
        maxima = torch.stack([self.maxima[number] for number in taken]) if taken else torch.full((1, 3), torch.nan)
        policy, value, total, approx_kl, clipped, value_clipped = means.mean(0).tolist()
        return LossStats(
            policy=policy,
            value=value,
            total=total,
            approx_kl=approx_kl,
            clip_fraction=clipped,
            value_clip_fraction=value_clipped,
            ratio_max=float(maxima[:, 0].max()),
            first_ratio_error=float(maxima[0, 1]),
            first_log_ratio_rms=math.sqrt(2 * max(float(means[0, 3]), 0.0)),  # k3 is half the square of a small one
            first_log_ratio_max=float(maxima[0, 2]),
            grad_norm=float(np.mean(self.norms)) if self.norms else float("nan"),
            skipped=self.skipped,
        )


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step counted from 1: rises over the warm-up, then follows the schedule.

    >>> [lr_factor(OptimConfig(schedule="linear", warmup_steps=2), step, 6) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    done = (step - 1 - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
    if optim.schedule == "linear":
        return 1.0 - done
    return 1.0 if optim.schedule == "constant" else 0.5 * (1.0 + float(np.cos(np.pi * done)))


def check_prompt_tokens(prompts: data.Prompts) -> str:
    """What the probe found of a few prompts, and of one that brings its BOS as a chat template writes it; raises
    `ConfigError` if the policy would read other tokens than its tokenizer makes."""
    texts, tokenizer = prompts.some_texts(_PROBED), prompts.tokens.tokenizer
    texts += [tokenizer.bos_token + text for text in texts[:1] if tokenizer.bos_token]
    found = probes.prompt_tokens(tokenizer, texts, prompts.tokens.encode(texts))
    if not found.passed:
        raise ConfigError(found.message, key="model.name_or_path", differing=found.difference)
    return found.message.removeprefix(f"{found.probe}: ")


def logged_samples(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """The first `count` responses with their scores and their KL in nats, as samples.jsonl holds them."""
    kl = ppo.masked_row_sum(rollout.logprobs - rollout.ref_logprobs, rollout.sequences.response_mask)
    rows = zip(rollout.prompts, rollout.texts, rollout.scores.tolist(), kl.tolist(), strict=True)
    names = ("prompt", "response", "score", "kl")
    return [dict(zip(names, row, strict=True)) for row in rows][:count]


def values_in_reach(experience: Experience, cliprange_value: float | None) -> probes.Finding:
    """The probe of this name, of an experience before anything is learnt."""
    mask = experience.sequences.response_mask
    distance = ppo.masked_mean((experience.returns - experience.old_values).square(), mask).sqrt()
    return probes.values_in_reach(float(distance), cliprange_value)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
