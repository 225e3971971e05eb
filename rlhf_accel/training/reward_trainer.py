"""Reward-model training: a transformer with a score is trained on ratings, labels or preferences that people gave.

Knows the order of the steps, from the config to the folder that `reward.model` takes. Knows no PPO.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import transformers

from rlhf_accel.algorithm.calibration import Reliability
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.data import feedback as preferences
from rlhf_accel.data import reward_texts, wheels
from rlhf_accel.data.feedback import Sets
from rlhf_accel.distributed.accelerator import release_accelerate
from rlhf_accel.distributed.launch_files import find_deepspeed_file
from rlhf_accel.models import classifier as classifiers
from rlhf_accel.runs import reward_card
from rlhf_accel.system import files
from rlhf_accel.system.arithmetic import unused_device
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.terminal import say
from rlhf_accel.training.feedback_trainer import FeedbackTrainer, training_arguments
from rlhf_accel.training.reward_evaluation import figures, normalization, write_record
from rlhf_accel.training.reward_output import free_folder, is_main, kept_if_refused, locked, on_main, work_folder


class RewardTrainer:
    """Trains a reward model on ratings, labels or preferences that people gave.

    >>> RewardTrainer(load(RewardTrainingConfig, "movie_reviews_reward")).fit()  # doctest: +SKIP
    """

    def __init__(self, config: RewardTrainingConfig) -> None:
        self.config = config

    def fit(self) -> dict[str, float]:
        """Train, evaluate on data.eval_split and write the folder run.output_dir; returns the metrics of its
        `reward_metrics.json`.

        Raises `ConfigError` before any training if the output folder is in use, the data cannot be used or the model
        cannot be loaded; `RunFailed` if the model diverges or the disk refuses the folder.
        """
        find_deepspeed_file()
        output = free_folder(self.config)
        try:
            with locked(output):
                return self._train(free_folder(self.config))  # again: another process may have filled it meanwhile
        finally:
            release_accelerate()  # transformers' Trainer has set it to run.precision

    def _train(self, output: Path) -> dict[str, float]:
        config, name = self.config, self.config.model.name_or_path
        labels = classifiers.known_labels(config)
        path, trusted = wheels.resolve_model(name), config.model.trust_remote_code
        tokenizer = classifiers.load_tokenizer(path, f"model.name_or_path={name}", trust_remote_code=trusted)
        sets = preferences.read(config.data, tokenizer, name, labels)
        if config.run.eval_every and not len(sets.tuning):
            raise ConfigError(
                f"run.eval_every={config.run.eval_every:g}: {sets.sources[1]} holds no rows to choose a checkpoint by; "
                "add rows, name data.tuning_split, or set run.eval_every=0",
                key="run.eval_every",
            )
        transformers.set_seed(config.run.seed)  # for the new head
        model = classifiers.load(config, tokenizer, sets.labels)
        arguments = training_arguments(config, str(output.parent))  # from here on the processes communicate
        unused = unused_device()
        if unused is not None and is_main():
            say(f"warning: {unused}")
        with work_folder(output) as work:
            arguments.output_dir = str(work)
            trainer = FeedbackTrainer(config, arguments, model, tokenizer, sets)
            seconds = float(trainer.train().metrics["train_runtime"])
            shift, scale = normalization(config, trainer.scores, sets.train)
            shift = 0.0 if classifiers.output_layer(model).bias is None else shift
            metrics, curves = self._evaluated(trainer, sets, shift, scale, seconds)
            kept = trainer.texts_to_keep(sets.train)
            finished = work / "model"
            trainer.save_model(str(finished))

            def write() -> None:
                trained = finished
                if config.lora.r:  # a few MiB, which the merged model replaces
                    trained = Path(shutil.copytree(finished, work / "trained"))
                unmerged = classifiers.finish(finished, config, tokenizer, sets.labels, shift, scale)
                record = replace(trainer.record(sets), unmerged=unmerged)
                with kept_if_refused(trained, output):
                    write_record(finished, record, sets.labels, kept, shift, scale, trust_remote_code=trusted)
                card = reward_card.describe(finished, config, sets.labels, sets.sources, metrics, curves)
                self._publish(finished, output, [*sets.notes, *trainer.cut_note(), *card], metrics)

            on_main(write)
        return metrics

    def _evaluated(
        self, trainer: FeedbackTrainer, sets: Sets, shift: float, scale: float, seconds: float
    ) -> tuple[dict[str, float], dict[str, Reliability]]:
        tuned, reported = ((trainer.scores(part.texts) - shift) / scale for part in (sets.tuning, sets.held))
        found, curves = figures(self.config.data.objective, sets.tuning, tuned, sets.held, reported)
        metrics = {
            **found,
            "time/train": round(seconds, 1),
            "reward/train_rows": len(sets.train),
            "reward/tuning_rows": len(sets.tuning),
            "reward/eval_rows": len(sets.held),
            "reward/cut_texts": trainer.cut,
        }
        if self.config.run.eval_every:
            metrics["reward/best_step"] = trainer.state.best_global_step or trainer.state.global_step
        return metrics, curves

    def _publish(self, finished: Path, output: Path, notes: list[str], metrics: dict[str, float]) -> None:
        """Move the finished folder to its place, and print notes and metrics."""
        files.flush_all(finished, like=finished / reward_texts.FILE)
        if output.exists():
            output.rmdir()  # free_folder found it empty
        finished.rename(output)
        say("\n".join([*notes, *(f"{name:28} {value:.4g}" for name, value in metrics.items())]))
        unmerged = "" if self.config.lora.merge else ", also with reward.on_policy_base=true"
        say(f"wrote {output}, which reward.model takes{unmerged}")


def train_reward(config: RewardTrainingConfig) -> dict[str, float]:
    """`RewardTrainer(config).fit()`."""
    return RewardTrainer(config).fit()
