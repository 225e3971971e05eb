"""Evaluate the models of a run on its held-out prompts, and estimate how much any policy could gain at a given KL.

Reads a run's folder and writes `evaluation.json` and `frontier.json` into it. Knows how a run is set up again; the
metrics are computed by `training/evaluation.py` and `algorithm/frontier.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from rlhf_accel.algorithm import frontier
from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.commands.parsers import DRAWN_FROM
from rlhf_accel.config.distribution import distribution, in_words, truncated
from rlhf_accel.config.loading import load_run
from rlhf_accel.config.places import absolute
from rlhf_accel.config.rules import changed_keys
from rlhf_accel.config.schema import Config, LoraConfig
from rlhf_accel.config.trust import require_trust
from rlhf_accel.distributed.portable import check_portable, portable_weights
from rlhf_accel.models.lora import CRITIC, scaled_adapter
from rlhf_accel.reward import Reward, RewardError, RewardFunction
from rlhf_accel.rollout.engine import Seeds
from rlhf_accel.rollout.scoring import score
from rlhf_accel.runs.checkpoint import CHECKPOINTS
from rlhf_accel.runs.exports import exported_weights
from rlhf_accel.runs.json_lines import read_rows
from rlhf_accel.runs.progress_line import ProgressLine
from rlhf_accel.runs.run_folder import model_folder
from rlhf_accel.runs.summary import read_summary, reward_scale, write_json
from rlhf_accel.system import console
from rlhf_accel.system.errors import ConfigError, RunFailed, key_in
from rlhf_accel.system.files import failure
from rlhf_accel.system.process import reseed
from rlhf_accel.training.evaluation import EVALUATION_SEED, Evaluation, evaluate, mean_interval
from rlhf_accel.training.setup import Setup, start

FRONTIER_STEP = 3 * 2**30  # of the random numbers; evaluations use steps from 2**31 on
BASE = "base"
# Rows of the table: title, metric, half-width of its interval if it has one, and number format.
_ROWS = (
    ("score", "score", "score_ci", "+.3f"),
    ("KL to the reference, nats", "kl", "kl_ci", ".2f"),
    ("wins over the base", "win_rate", "win_rate_ci", ".1%"),
    ("response tokens", "length", "", ".1f"),
    ("ended by a stop", "eos_fraction", "", ".1%"),
    ("distinct tokens", "distinct_1", "", ".3f"),
    ("distinct pairs of tokens", "distinct_2", "", ".3f"),
    ("4-grams that repeat", "self_repetition", "", ".2%"),
    ("perplexity under the reference", "reference_perplexity", "", ".1f"),
)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A run set up again to sample and to score: reference, held-out prompts, and the reward on the run's scale."""

    run: Path
    config: Config
    setup: Setup
    reward: Reward
    prompts: PromptBatch

    @classmethod
    def of(
        cls, run: Path, config: Config, *, prompts: int | None = None, reward: RewardFunction | None = None
    ) -> Judge:
        """With `prompts` held-out prompts, by default run.eval_samples. `reward` is the callable of a run that was
        given one.

        Raises `ConfigError` if the run cannot be set up here, has no held-out prompts, or has not calibrated its reward
        yet.
        """
        scale = reward_scale(run)
        if scale is None and config.reward.calibrate:
            raise ConfigError(
                f"{run} has neither summary.json nor a checkpoint yet, which record the scale of its scores"
            )
        count = prompts or config.run.eval_samples
        if not count:
            raise ConfigError(
                f"run.eval_samples=0 in {run / 'config.yaml'}; set the number of prompts with --prompts",
                key="run.eval_samples",
            )
        config = absolute(config)
        setup = Setup.of(config, start(config, training=False), reward, critic=False)
        if setup.held_out is None:
            raise ConfigError(
                "no text of data.source is held out, so there are no prompts to evaluate on",
                key="data.source",
            )
        return cls(
            run=run,
            config=config,
            setup=setup,
            reward=replace(setup.reward, **(scale or {})),
            prompts=setup.held_out.fixed(count),
        )

    def base(self, samples: int, line: ProgressLine, done: int = 0) -> Evaluation:
        """Evaluates the reference, which is the policy as it was set up. Call it before `model`."""
        return self._evaluate(samples, line, done, BASE, None)

    def model(self, which: str, base: Evaluation, samples: int, line: ProgressLine, done: int = 0) -> Evaluation:
        """Evaluates a model of the run's folder: `final`, `best`, or the portable checkpoint `step-NNNNNN`. With
        `@SCALE` after its name, its adapter is scaled."""
        name, scale = _split(which)
        weights = self._weights(model_folder(self.run, name))
        self.setup.runtime.set_weights(weights if scale == 1 else scaled_adapter(weights, scale))
        return self._evaluate(samples, line, done, which, base)

    def reference_scores(self, samples: int, line: ProgressLine) -> Float[Tensor, "P N"]:
        """Scores of so many responses of the reference to each prompt, with separate random numbers. Call it before
        `model`. Raises `RewardError` if the reward fails or returns a score that is not finite."""
        runtime, collector, count = self.setup.runtime, self.setup.collector, len(self.prompts)
        columns: list[Tensor] = []
        try:
            with runtime.gathered():
                for number in range(samples):
                    reseed(self.config.run.seed, FRONTIER_STEP + number, runtime.rank)
                    responses = collector.sample(self.prompts, Seeds(EVALUATION_SEED, FRONTIER_STEP + number))
                    columns.append(runtime.gather_rows(score(runtime, responses, self.reward), count))
                    line.advance(number + 1, f"of the reference for {count} prompts")
        except KeyboardInterrupt:
            message = f"stopped by Ctrl-C after {len(columns)} of {samples} samples; nothing is written"
            raise KeyboardInterrupt(message) from None
        scores = torch.stack(columns, dim=1)
        if not scores.isfinite().all():
            raise RewardError(
                f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores of the reference are not finite"
            )
        return scores

    def _evaluate(self, samples: int, line: ProgressLine, done: int, name: str, base: Evaluation | None) -> Evaluation:
        line.say(f"evaluating {name} on {len(self.prompts)} held-out prompts")
        reseed(self.config.run.seed, 0, self.setup.runtime.rank)
        return evaluate(
            self.setup.collector,
            self.reward,
            self.prompts,
            golds=self.setup.golds,
            base=None if base is None else base.scores,
            samples=samples,
            say=line.say,
            after=lambda number: line.advance(done + number, name),
        )

    def _weights(self, place: Path) -> dict[str, Tensor]:
        policy = self.setup.runtime.plain_module.policy
        if place.parent.name != CHECKPOINTS:
            return {f"policy.{key}": value for key, value in exported_weights(policy, self.config, str(place)).items()}
        weights = portable_weights(place)
        return {
            key: value for key, value in weights.items() if key.startswith("policy.") and CRITIC not in key.split(".")
        }


def main(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for a folder or options that cannot be used, `RunFailed` if the reward fails."""
    console.may_fail()
    options.run = options.run.absolute()
    config = _config(options)
    names = _names(options, config.lora)
    judge = Judge.of(options.run, config, prompts=options.prompts)
    main_only = judge.setup.runtime.is_main
    curves, reference, evaluations = None, None, {}
    try:
        if options.frontier is not None:
            with ProgressLine(options.frontier, enabled=main_only, unit="sample") as line:
                reference = judge.reference_scores(options.frontier, line)
            curves = frontier.estimate(reference.double().numpy())
            curves = replace(curves, no_share=truncated(config.rollout) or curves.no_share)
        if names is not None:
            total = (len(names) + 1) * options.samples
            with ProgressLine(total, enabled=main_only, unit="evaluation") as line:
                base = judge.base(options.samples, line)
                evaluations[BASE] = base
                for number, name in enumerate(names, start=1):
                    evaluations[name] = judge.model(name, base, options.samples, line, number * options.samples)
    except RewardError as error:
        raise RunFailed(f"{error}; nothing is written") from error
    console_line = ProgressLine(1, enabled=main_only)
    if evaluations:
        _write(judge, "evaluation.json", evaluation_tree(judge, options.samples, evaluations), console_line)
        console_line.console.print(_table(evaluations, in_words(distribution(config.rollout))))
    if curves is not None and reference is not None:
        points = frontier_points(judge, curves, reference, evaluations, console_line.say)
        _write(judge, "frontier.json", {**curves.to_json(), "points": points}, console_line)
        console_line.console.print(_frontier_table(curves, points))
        if curves.no_share is not None:
            console_line.say(f"no share of the optimum is given: {curves.no_share}")
    judge.setup.runtime.anywhere(False)  # the main process has written: all leave together
    judge.setup.runtime.close()


def evaluation_tree(judge: Judge, samples: int, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The content of evaluation.json: the metrics of each model, named as in summary.json, and their conditions."""
    return {
        "prompts": len(judge.prompts),
        "samples": samples,
        "sampling": distribution(judge.config.rollout),
        "reward": [name for name, _, _ in judge.reward.terms],
        "gold": list(judge.setup.golds),
        "calibration": {"mean": judge.reward.mean, "std": judge.reward.std},
        "models": {
            name: {"step": step_of(judge.run, name), **evaluation.figures} for name, evaluation in evaluations.items()
        },
    }


def frontier_points(
    judge: Judge,
    curves: frontier.Frontier,
    reference: Float[Tensor, "P N"],
    evaluations: Mapping[str, Evaluation],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The run's position beside the frontier: its evaluations during training, and the ones made now.

    A gain is the mean score minus that of the reference's N samples for the same prompts, a better estimate than the
    single sample per prompt that training compares with. For an evaluation made now, the interval is that of the mean
    over prompts of these differences, in which differences between prompts cancel. For one made during training, only
    the mean is recorded, and the interval is that of the score, which is wider.
    """
    points = []
    rows, _ = read_rows(judge.run / "metrics.jsonl")
    held_out, usual = judge.setup.held_out, judge.config.run.eval_samples
    if held_out is not None and len(judge.prompts) != min(usual, len(held_out)):
        say(f"evaluations during training used other prompts (run.eval_samples={usual}) and are left out")
        rows = []
    then, now = (distribution(config.rollout) for config in (load_run(judge.run / "config.yaml"), judge.config))
    if rows and then != now:
        say(f"evaluations during training sampled with {in_words(then)}, not with {in_words(now)}, and are left out")
        rows = []
    for row in rows:
        known = {key: row[key] for key in ("step", "eval/score", "eval/kl") if isinstance(row.get(key), (int, float))}
        if len(known) < 3:  # no evaluation at this step, or metrics that are not finite
            continue
        row = {**row, **{key: None for key in ("eval/score_ci", "eval/kl_ci") if not isinstance(row.get(key), float)}}
        gain = (row["eval/score"] - curves.score, row.get("eval/score_ci"))
        points.append(_point(curves, f"step {row['step']}", row["step"], (row["eval/kl"], row.get("eval/kl_ci")), gain))
    for name, evaluation in evaluations.items():
        if name != BASE:
            gain = mean_interval(evaluation.scores.mean(1) - reference.mean(1))
            kl = evaluation.figures["kl"], evaluation.figures["kl_ci"]
            points.append(_point(curves, name, step_of(judge.run, name), kl, gain))
    return points


def step_of(run: Path, which: str) -> int | None:
    """The step of a model of a run's folder; None if it is not recorded."""
    if which == BASE:
        return 0
    which, _ = _split(which)
    if which.startswith("step-"):
        return int(which.removeprefix("step-").removesuffix(".old"))
    summary = read_summary(run) or {}
    return summary.get("steps") if which == "final" else (summary.get("best") or {}).get("step")


def _point(
    curves: frontier.Frontier,
    name: str,
    step: int | None,
    kl: tuple[float, float | None],
    gain: tuple[float, float | None],
) -> dict[str, Any]:
    """A point beside the curves; `kl` and `gain` with the half-widths of their intervals, if known."""
    kl_half, half = (math.nan if part is None else part for part in (kl[1], gain[1]))
    share = frontier.share_of_optimum(curves, kl[0], gain[0])
    return {
        **{"name": name, "step": step, "kl": kl[0], "kl_low": kl[0] - kl_half, "kl_high": kl[0] + kl_half},
        **{"gain": gain[0], "low": gain[0] - half, "high": gain[0] + half},
        "share": None if share is None else share.value,
        "share_is_lower_bound": None if share is None else share.is_lower_bound,
    }


def _config(options: argparse.Namespace) -> Config:
    """The run's config with the overrides. Raises `ConfigError` for an override that would change the run."""
    path = options.run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{options.run} is not a run's folder: it has no config.yaml")
    before, overrides = load_run(path), options.overrides
    if options.batch is not None:
        overrides = [*overrides, "--rollout.forward_batch_size", str(options.batch)]
    config = load_run(path, overrides)
    changed = [change for change in changed_keys(before, config) if key_in(change) not in DRAWN_FROM]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: a run is evaluated with its own config; only {', '.join(DRAWN_FROM)} and keys that "
            "change no result may differ",
            key=key_in(changed[0]),
        )
    # A gold reward of the command line is the user's own.
    ours = replace(config.reward, gold=() if before.reward.gold != config.reward.gold else config.reward.gold)
    require_trust(replace(config, reward=ours), options.run, options.trust_code)
    return config


def _names(options: argparse.Namespace, lora: LoraConfig) -> list[str] | None:
    """The models to evaluate beside the base, which exist; None for no evaluation."""
    run = options.run
    if options.which is None:
        if options.frontier is not None:
            return None
        names = [name for name in ("best", "final") if (run / name).is_dir()]
        if not names:
            raise ConfigError(
                f"{run} has neither best/ nor final/ yet; name a checkpoint with --which step-NNNNNN, or base",
                key="--which",
            )
        return names
    names = [name for name in dict.fromkeys(options.which) if name != BASE]
    for which in names:
        name, scale = _split(which)
        if (name not in ("best", "final") and not name.startswith("step-")) or not 0 < scale <= 1:
            raise ConfigError(
                f"--which {which}: expected base, best, final or step-NNNNNN, or MODEL@SCALE with a scale up to 1",
                key="--which",
            )
        if scale != 1 and (not lora.r or lora.use_dora or lora.modules_to_save or lora.adapter):
            raise ConfigError(
                f"--which {which}: only runs with lora.r above 0, and without lora.use_dora, lora.modules_to_save and "
                "lora.adapter, have an adapter that can be scaled back to the base",
                key="--which",
            )
        place = model_folder(run, name)
        if place.parent.name == CHECKPOINTS:
            check_portable(place)
    return names


def _split(which: str) -> tuple[str, float]:
    """The model's name and the scale of its adapter, which is nan if it is not a number."""
    name, at, scale = which.partition("@")
    try:
        return name, float(scale) if at else 1.0
    except ValueError:
        return name, math.nan


def _write(judge: Judge, name: str, tree: Mapping[str, Any], line: ProgressLine) -> None:
    runtime, path = judge.setup.runtime, judge.run / name
    problem = runtime.first_failure(failure(lambda: write_json(path, tree)) if runtime.is_main else None)
    if problem is not None:
        raise RunFailed(f"{path} could not be written: {problem}")
    line.say(f"wrote {path}")


def _table(evaluations: Mapping[str, Evaluation], drawn_from: str) -> Table:
    title = f"held-out prompts, responses at {drawn_from}, ± half-width of the 95 % interval"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right")
    first = next(iter(evaluations.values()))
    rows = [*_ROWS, *((name, f"score/{name}", f"score_ci/{name}", "+.3f") for name in first.rollout.term_scores)]
    rows += [*((f"{name}, not trained on", f"gold/{name}", f"gold_ci/{name}", "+.3f") for name in first.golds)]
    for title, name, half, form in rows:
        table.add_row(title, *(_cell(evaluation.figures, name, half, form) for evaluation in evaluations.values()))
    return table


def _cell(figures: Mapping[str, float], name: str, half: str, form: str) -> str:
    if name not in figures:
        return ""
    return f"{figures[name]:{form}}" + (f" ± {figures[half]:{form.removeprefix('+')}}" if half else "")


def _frontier_table(curves: frontier.Frontier, points: Sequence[Mapping[str, Any]]) -> Table:
    known = "not known" if curves.no_share is not None else f"known up to {curves.reliable_kl:.2f} nats"
    title = f"gain over the reference's {curves.score:+.3f}; the optimum is {known}"
    table = Table(title=title, title_justify="left")
    for column in ("", "KL, nats", "gain", "share of the optimum at that KL"):
        table.add_column(column, justify="right" if column else "left")
    for best in curves.best_of_n:
        table.add_row(f"best of {best.n}", f"{best.kl:.2f}", f"{best.gain:+.3f}", "")
    for point in points:
        share = "" if point["share"] is None else f"{point['share']:.0%}"
        if point["share_is_lower_bound"]:
            share = f"at least {share}"
        table.add_row(point["name"], f"{point['kl']:.2f}", f"{point['gain']:+.3f}", share)
    return table
