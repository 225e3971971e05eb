"""The run around its steps: its folder, evaluations, the best model, stop signals, and the end of a run.

Every public method is called by all ranks. The maths of a step is in `ppo_trainer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_accel.config.distribution import distribution, truncated
from rlhf_accel.config.rules import without_effect
from rlhf_accel.config.schema import Config
from rlhf_accel.distributed.liveness import is_lost_contact, missing, who_is_missing
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.rollout.scoring import FailedScoring
from rlhf_accel.runs import checkpoint, hub, resume, run_folder
from rlhf_accel.runs.checkpoint import Progress, SaveError
from rlhf_accel.runs.exports import ExportError, ExportProbe
from rlhf_accel.runs.progress_line import ProgressLine
from rlhf_accel.runs.recorder import Recorder
from rlhf_accel.runs.report import page
from rlhf_accel.system.arithmetic import computes_in_bf16, unused_device
from rlhf_accel.system.errors import RunFailed
from rlhf_accel.system.process import reseed
from rlhf_accel.system.signals import StopRequest
from rlhf_accel.training import failures
from rlhf_accel.training.evaluation import Evaluation, compare, evaluate, first_samples, sample_pairs
from rlhf_accel.training.setup import Setup
from rlhf_accel.training.step_metrics import logged_samples

if TYPE_CHECKING:
    from rlhf_accel.training.ppo_trainer import PPOTrainer

_EVALUATION = 1  # stream of the global random numbers; steps have their own (ppo_trainer.py)
_SHOWN = 10  # held-out samples in the summary, before and after training


class Stopped(Exception):
    """A signal asked the run to stop, and a phase has ended."""


def check_folder(config: Config, runtime: Runtime) -> None:
    """Check the folder and access to the hub as a run does before it is set up. Raises `ConfigError` on every rank."""
    folder = runtime.from_main(lambda: run_folder.choose_folder(config))
    _resume_from(config, runtime, folder, lambda _: None)


def _resume_from(config: Config, runtime: Runtime, folder: Path, log: Callable[[str], None]) -> Path | None:
    if config.run.push_to_hub is not None:
        runtime.from_main(lambda: hub.check(config))
    stage, size = runtime.zero_stage, runtime.world_size
    return runtime.from_main(lambda: resume.resume_folder(config, folder, log, zero_stage=stage, world_size=size))


class Run:
    """The run of one trainer, from the choice of its folder to its summary."""

    def __init__(self, trainer: PPOTrainer, given: Config) -> None:
        """`given` is the config as its user wrote it. Raises `ConfigError` if the folder cannot be used."""
        self.trainer, self.config, self.runtime = trainer, trainer.config, trainer.runtime
        config, runtime = self.config, self.runtime
        folder = runtime.from_main(lambda: run_folder.choose_folder(config))
        self.line = ProgressLine(config.run.total_steps, enabled=runtime.is_main)
        self.recorder = Recorder(config, folder, runtime, self.line, given)
        runtime.from_main(self.recorder.claim)
        self.resume_from = _resume_from(config, runtime, folder, self.line.say)
        self.evaluation: Evaluation | None = None  # the last one
        self._stop = StopRequest()

    def check_exports(self, setup: Setup) -> None:
        """Have every export compared with the model in memory, on a few prompts of the run."""
        self.recorder.left_out = setup.left_out
        self.export_probe = ExportProbe(self.config, self.runtime.device, (setup.held_out or setup.prompts).fixed(16))

    def warn(self, message: str) -> None:
        self.line.say(f"warning: {message}")

    def fit(self) -> dict[str, Any]:
        """`PPOTrainer.fit`."""
        trainer = self.trainer
        trainer.between = self.stop_if_asked
        with StopRequest() as self._stop:
            try:
                self._introduce()
                trainer.prepare()
                self.recorder.open(trainer.progress, self.resume_from)
                return self._train()
            except Stopped:
                raise failures.stopped(self, self._stop.received) from None
            except FailedScoring as error:
                raise failures.scoring_failed(self, error) from error
            except KeyboardInterrupt:
                raise failures.interrupted(self) from None
            except RunFailed:
                raise
            except RuntimeError as error:
                if self.runtime.world_size > 1 and is_lost_contact(error):
                    found = who_is_missing(self.runtime.rank, self.recorder.heartbeat, missing())
                    reason = str(error).partition("\n")[0]
                    raise RunFailed(f"{found} ({reason}); {self.recorder.how_to_resume()}") from error
                raise
            finally:
                self.recorder.close()

    def resumed(self, place: Path) -> Progress:
        """The progress of the checkpoint at `place`, for this run."""
        progress = checkpoint.load_progress(place)
        if not self.runtime.from_main((self.recorder.folder / "best").is_dir):  # another run's best, in another folder
            progress = replace(progress, best_score=None, best_kl=None, best_step=None)
        progress = self._without_best_beyond_budget(progress)
        if progress.base is not None and progress.base_scores is None:
            self.line.say(f"{place} holds no scores of the base: evaluations are without eval/win_rate")
        self.line.say(f"resuming after step {progress.step} from {place}")
        return progress

    def stop_if_asked(self) -> None:
        """Raises `Stopped` on every rank if any rank has received a stop signal. Called between phases."""
        if self.runtime.anywhere(self._stop.received is not None):
            raise Stopped

    def _introduce(self) -> None:
        setup, config = self.trainer.setup, self.config
        products = self.recorder.products.message
        self.line.say(f"run folder {self.recorder.folder}\n{setup.description}\n{products}")
        if setup.left_out is not None:
            self.line.say(f"note: {setup.left_out}")
        unused = unused_device()
        if unused is not None:
            self.warn(unused)
        asked = {"run.precision": config.run.precision, "model.dtype": config.model.dtype}
        keys = " and ".join(f"{key}=bf16" for key, dtype in asked.items() if dtype == "bf16")
        if keys and not computes_in_bf16(self.runtime.device):
            self.warn(f"{keys}: this device only emulates bf16, which takes many times longer than fp32")
        idle = without_effect(config)
        if idle:
            self.warn(f"{', '.join(idle)}: without effect, as ppo.advantage={config.ppo.advantage} has no critic")
        cut = truncated(config.rollout)
        if cut is not None:
            self.warn(
                f"{cut}; so are the penalty, ppo.kl_target, eval/kl and run.best_kl_budget, which follow it. The "
                f"policy's own: python -m rlhf_accel evaluate {self.recorder.folder} --rollout.top_k 0 "
                "--rollout.top_p 1"
            )
        for _, caution in setup.cautions():
            self.warn(caution)

    def _train(self) -> dict[str, Any]:
        trainer, run = self.trainer, self.config.run
        if trainer.progress.step == 0 and trainer.progress.base is None:
            self._evaluate_base()
        with self.line:
            self._conclude()
            for step in range(trainer.progress.step + 1, run.total_steps + 1):
                metrics = trainer.step(trainer.setup.prompts.batch(step, trainer.setup.sizes.prompts))
                if run.sample_every and (step == 1 or _due(step, run.sample_every)) and trainer.rollout is not None:
                    self.recorder.samples(step, logged_samples(trainer.rollout, run.sample_count))
                trainer.progress = replace(trainer.progress, unrecorded=metrics)
                if self._evaluates_after(step):
                    self.stop_if_asked()
                self._conclude()
                self.stop_if_asked()
        return self._finish()

    def _evaluate_base(self) -> None:
        base = self.evaluate()
        if base is not None:
            self.trainer.progress = replace(
                self.trainer.progress,
                base=base.figures,
                base_scores=base.rollout.scores.tolist(),
                base_samples=first_samples(base, _SHOWN),
            )
        self.stop_if_asked()

    def _conclude(self) -> None:
        """Evaluate, record and save after a step, as far as they are due; also after a resume, for the step before."""
        trainer = self.trainer
        metrics = trainer.progress.unrecorded
        if metrics is None:
            return
        step = int(metrics["step"])
        if self._evaluates_after(step):
            self.evaluation = self.evaluate()
            if self.evaluation is not None:
                metrics = metrics | self.evaluation.metrics()
                self._keep_best(self.evaluation)
        trainer.progress = replace(trainer.progress, unrecorded=None)
        self.recorder.record(metrics)
        if _due(step, self.config.run.save_every):
            self.recorder.save(trainer.progress)

    def evaluate(self) -> Evaluation | None:
        """Evaluate the current policy on the held-out prompts; None if there are none or run.eval_samples is 0."""
        trainer, setup = self.trainer, self.trainer.setup
        if setup.held_out is None or self.config.run.eval_samples == 0:
            return None
        prompts = setup.held_out.fixed(self.config.run.eval_samples)
        self.line.say(f"evaluating on {len(prompts)} held-out prompts")
        self.recorder.heartbeat(f"evaluation after step {trainer.progress.step}")
        reseed(self.config.run.seed, trainer.progress.step, self.runtime.rank, _EVALUATION)
        scores = trainer.progress.base_scores
        # run.changes may have let a resumed run evaluate on more or fewer prompts.
        base = torch.tensor(scores)[:, None] if scores is not None and len(scores) == len(prompts) else None
        return evaluate(trainer.collector, trainer.reward, prompts, golds=setup.golds, base=base, say=self.line.say)

    def _evaluates_after(self, step: int) -> bool:
        return _due(step, self.config.run.eval_every) or step == self.config.run.total_steps

    def _keep_best(self, evaluation: Evaluation) -> None:
        trainer, budget = self.trainer, self.config.run.best_kl_budget
        best, score, kl = trainer.progress.best_score, evaluation.figures["score"], evaluation.figures["kl"]
        if not math.isfinite(score) or (best is not None and score <= best):
            return
        if budget is not None and not kl <= budget:
            return
        drawn_from = distribution(self.config.rollout)
        results = {"steps": trainer.progress.step, "sampling": drawn_from, **compare(trainer.progress.base, evaluation)}
        try:
            self.recorder.export("best", results, trainer.setup.tokens, self.export_probe)
        except SaveError as error:
            self.warn(f"best/ could not be written: {error}")
        except ExportError as error:  # all later exports would fail too
            raise failures.saved_and_failed(self, str(error)) from error
        else:
            trainer.progress = replace(trainer.progress, best_score=score, best_kl=kl, best_step=trainer.progress.step)

    def _without_best_beyond_budget(self, progress: Progress) -> Progress:
        """The progress of a run resumed with another run.best_kl_budget, without a best model that exceeds it.

        The folder best/ stays until an evaluation is within the budget.
        """
        budget, kl = self.config.run.best_kl_budget, progress.best_kl
        if budget is None or progress.best_score is None or (kl is not None and kl <= budget):
            return progress
        found = "an unknown KL" if kl is None else f"a KL of {kl:.2f} nats"
        self.line.say(f"best/ has {found}, beyond run.best_kl_budget={budget:g}: the next within it will replace it")
        return replace(progress, best_score=None, best_kl=None, best_step=None)

    def _finish(self) -> dict[str, Any]:
        """Export the policy and write the summary, with the held-out score before and after."""
        trainer, run = self.trainer, self.config.run
        last, best = self.evaluation or self.evaluate(), trainer.progress
        summary: dict[str, Any] = {
            "steps": trainer.progress.step,
            "seconds": self.recorder.seconds(trainer.progress),
            "calibration": {"mean": trainer.reward.mean, "std": trainer.reward.std},
            "sampling": distribution(self.config.rollout),
        }
        if last is not None and trainer.progress.base is not None:
            summary |= compare(trainer.progress.base, last)
            summary["samples"] = sample_pairs(trainer.progress.base_samples or [], last)
        if best.best_score is not None:
            summary["best"] = {"step": best.best_step, "score": best.best_score, "kl": best.best_kl}
        elif last is not None and run.best_kl_budget is not None:
            self.warn(f"no evaluation was within run.best_kl_budget={run.best_kl_budget:g}: best/ is not written")
        cut = self._cut_texts()
        if cut:
            summary["cut_texts"] = cut
        try:
            self.recorder.finish(summary, trainer.setup.tokens, self.export_probe)
        except ExportError as error:
            raise failures.saved_and_failed(self, str(error)) from error
        if run.report and self.runtime.is_main:
            page.after_training(self.recorder.folder, self.line.say)
        return summary

    def _cut_texts(self) -> dict[str, dict[str, int]]:
        """For each classifier that had to cut texts on any rank, their number; prints a warning for each."""
        found = {}
        for name, _, term in self.trainer.reward.classifiers:
            counts = torch.tensor([term.read, term.cut, term.unread])
            read, cut, unread = self.runtime.sum(counts).tolist()
            if cut:
                found[name] = {"read": read, "cut": cut, "unread": unread}
                nothing = f", and read nothing of {unread} responses" if unread else ""
                share = f"{cut} of {read} texts ({cut / read:.1%})"
                self.warn(f"{name} cut {share} to the {term.max_tokens} tokens that it can read{nothing}")
        return found


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
