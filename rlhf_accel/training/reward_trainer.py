"""Reward-model training: a transformer with a score learns ratings, labels or preferences that people gave.

The loop is transformers' `Trainer`; this file knows the objectives, the figures that are reported and the folder that
`reward.model` takes. Knows no PPO.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from rlhf_accel.algorithm import calibration
from rlhf_accel.algorithm.calibration import preference_loss
from rlhf_accel.config.loading import from_command_line
from rlhf_accel.config.schema import RewardConfig, RewardTrainingConfig
from rlhf_accel.data import feedback as preferences
from rlhf_accel.data import reward_texts, wheels
from rlhf_accel.data.embedded import REWARD_RECIPE
from rlhf_accel.data.feedback import Feedback, Sets
from rlhf_accel.data.reward_texts import Probe, Record
from rlhf_accel.distributed.accelerator import release_accelerate
from rlhf_accel.models import classifier as classifiers
from rlhf_accel.models.probes import trained_scored
from rlhf_accel.reward import Classifier
from rlhf_accel.runs import reward_card
from rlhf_accel.system import console, files
from rlhf_accel.system.arithmetic import computes_in_bf16, has_gpu, multiplies_exactly
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.lock import hold
from rlhf_accel.system.process import quiet_libraries, tune_process
from rlhf_accel.system.terminal import say

# Texts that mean and variance of the scores are taken over, drawn with random numbers of their own.
_NORMALIZED_TEXTS, _NORMALIZED_SEED = 2048, 7


class RewardTrainer:
    """A reward model from ratings, labels or preferences that people gave; `fit()` does the whole run."""

    def __init__(self, config: RewardTrainingConfig) -> None:
        self.config = config

    def fit(self) -> dict[str, float]:
        """As `train_reward`."""
        return train_reward(self.config)


def train_reward(config: RewardTrainingConfig) -> dict[str, float]:
    """Train, evaluate on data.eval_split and write the folder run.output_dir; returns what its metrics file holds.

    Raises `ConfigError` before any training on an output folder in use, data that cannot be learned from, or a model
    that cannot be loaded; `RunFailed` if the model diverged, or the disk refuses it.
    """
    output = _free_folder(config)
    try:
        with _alone(output):
            return _train(config, _free_folder(config))  # once more: whom it waited for may have filled it
    finally:
        release_accelerate()  # transformers' Trainer took it in run.precision


def _train(config: RewardTrainingConfig, output: Path) -> dict[str, float]:
    name = config.model.name_or_path
    labels = classifiers.known_labels(config)
    path, trusted = wheels.resolve_model(name), config.model.trust_remote_code
    tokenizer = classifiers.load_tokenizer(path, f"model.name_or_path={name}", trust_remote_code=trusted)
    sets = preferences.read(config.data, tokenizer, name, labels)
    if config.run.eval_every and not len(sets.tuning):
        raise ConfigError(
            f"run.eval_every={config.run.eval_every:g}: {sets.sources[1]} holds no rows to choose a checkpoint by; add "
            "rows, name data.tuning_split, or set run.eval_every=0",
            key="run.eval_every",
        )
    transformers.set_seed(config.run.seed)  # the new head
    model = classifiers.load(config, tokenizer, sets.labels)
    arguments = _arguments(config, str(output.parent))  # now the processes have met
    with _work_folder(output) as work:
        arguments.output_dir = str(work)
        trainer = FeedbackTrainer(config, arguments, model, tokenizer, sets)
        seconds = trainer.train().metrics["train_runtime"]
        shift, scale = _normalization(config, trainer, sets.learned)
        shift = 0.0 if classifiers.output_layer(model).bias is None else shift
        tuned, reported = ((trainer.scores(part.texts) - shift) / scale for part in (sets.tuning, sets.held))
        found, curves = figures(config.data.objective, sets.tuning, tuned, sets.held, reported)
        metrics = {
            **found,
            "time/train": round(float(seconds), 1),
            "reward/train_rows": len(sets.learned),
            "reward/tuning_rows": len(sets.tuning),
            "reward/eval_rows": len(sets.held),
            "reward/cut_texts": trainer.cut,
        }
        if config.run.eval_every:
            metrics["reward/best_step"] = trainer.state.best_global_step or trainer.state.global_step
        kept = trainer.texts_to_keep(sets.learned)
        finished = work / "model"
        trainer.save_model(str(finished))

        def finish() -> None:
            classifiers.finish(finished, config, tokenizer, sets.labels, shift, scale)
            record = trainer.record(sets)
            write_record(finished, record, sets.labels, kept, shift, scale, trust_remote_code=trusted)
            notes = [
                *sets.notes,
                *trainer.cut_note(),
                *reward_card.describe(finished, config, sets.labels, sets.sources, metrics, curves),
            ]
            files.flush_all(finished, like=finished / "config.json")
            if output.exists():
                output.rmdir()  # empty: _free_folder looked
            finished.rename(output)
            say("\n".join([*notes, *(f"{name:28} {value:.4g}" for name, value in metrics.items())]))
            say(f"wrote {output}, which reward.model takes")

        _on_main(finish)
    return metrics


@dataclass(frozen=True)
class Kept:
    """Texts of the training, to see later that they are scored as they were."""

    texts: tuple[str, ...]
    ids: list[list[int]]  # that training read
    scores: Tensor  # (N, K), fp32, of the model in memory, not normalised
    dtype: torch.dtype  # that the scores may be rounded to on their way: bf16 for TF32 too


class FeedbackTrainer(Trainer):  # type: ignore[misc]  # mypy skips transformers, whose types are not whole
    """transformers' loop with the losses of the three objectives, and evaluation by the scores of texts."""

    def __init__(
        self, config: RewardTrainingConfig, arguments: TrainingArguments, model: Any, tokenizer: Any, sets: Sets
    ) -> None:
        self.config = config
        self.objective = config.data.objective
        self.tokenizer = tokenizer
        self.max_tokens = min(config.data.max_tokens, classifiers.most_tokens(model, tokenizer))
        self.ids, self.cut = self._learned_ids(sets.learned)
        evaluated = self._numbered(sets.tuning.texts) if config.run.eval_every else None

        def loss(prediction: transformers.EvalPrediction) -> dict[str, float]:
            scores = _in_order(prediction.predictions, prediction.label_ids, len(sets.tuning.texts))
            return {"loss": tuning_loss(self.objective, sets.tuning, scores)}

        self._tuning_metrics = loss
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self._examples(sets.learned),
            eval_dataset=evaluated,
            data_collator=_Collator(tokenizer),
            processing_class=tokenizer,
            compute_metrics=loss,  # of evaluate(); scores() takes it out
            callbacks=[_Progress(config.data.objective)],
        )
        for noisy in (transformers.trainer_callback.PrinterCallback, transformers.trainer_callback.ProgressCallback):
            self.remove_callback(noisy)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean over the rows of the batch; the processes' gradients are averaged."""
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        if self.objective == "ratings":
            return nn.functional.mse_loss(logits.squeeze(-1), labels)
        if self.objective == "labels":
            return nn.functional.cross_entropy(logits, labels)
        chosen, rejected = logits.squeeze(-1).chunk(2)
        return preference_loss(chosen, rejected, labels)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        places = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        return None, logits.float(), places

    def scores(self, texts: tuple[str, ...]) -> np.ndarray:
        """Logits (N, K) of the texts in fp64, on every process; raises `RunFailed` if they are not finite."""
        if not texts:
            return np.zeros((0, self.model.config.num_labels))
        self.compute_metrics = None  # which is for the tuning texts
        try:
            found = self.predict(self._numbered(texts))
        finally:
            self.compute_metrics = self._tuning_metrics
        scores = _in_order(found.predictions, found.label_ids, len(texts))
        if not np.isfinite(scores).all():
            raise RunFailed(
                f"the model scores {scores[~np.isfinite(scores)][0]} after training, so it diverged; lower optim.lr. "
                "Nothing is written"
            )
        return scores

    def _numbered(self, texts: tuple[str, ...]) -> list[dict[str, Any]]:
        """Texts with their places: the Trainer groups these sets by length too, so that rows come in another order."""
        rows, _ = reward_texts.encode(self.tokenizer, texts, self.max_tokens)
        return [{"input_ids": row["input_ids"], "labels": i} for i, row in enumerate(rows)]

    def _examples(self, learned: Feedback) -> list[dict[str, Any]] | datasets.Dataset:
        ids = self.ids
        if learned.targets is not None:
            return [{"input_ids": row, "labels": t} for row, t in zip(ids, learned.targets.tolist(), strict=True)]
        pairs = [
            {"input_ids": ids[chosen], "rejected_ids": ids[rejected], "labels": margin}
            for (chosen, rejected), margin in zip(learned.pairs.tolist(), learned.margins.tolist(), strict=True)
        ]
        different = [pair for pair in pairs if pair["input_ids"] != pair["rejected_ids"]]
        if not different:
            raise ConfigError(
                f"data.max_tokens={self.max_tokens}: the two texts of every pair are the same in their first "
                f"{self.max_tokens} tokens; raise it",
                key="data.max_tokens",
            )
        if len(different) < len(pairs) and _is_main():
            say(
                f"{len(pairs) - len(different)} of {len(pairs)} pairs are left out: their texts are the same in their "
                f"first data.max_tokens={self.max_tokens} tokens"
            )
        # Batches are made of rows of like length, in the order of their lengths. Were those the preferred texts', then
        # for some steps all preferred texts would be long, then all short, and that alone would be learned.
        longer = [max(len(pair["input_ids"]), len(pair["rejected_ids"])) for pair in different]
        return datasets.Dataset.from_list(different).add_column("length", longer)

    def texts_to_keep(self, learned: Feedback) -> Kept:
        """What goes beside the model; for all processes at once."""
        short = [len(text) <= reward_texts.LONGEST_PROBE for text in learned.texts]
        places = reward_texts.spread([len(ids) for ids in self.ids], short)
        texts = tuple(learned.texts[i] for i in places)
        rounded = self.args.bf16 or not multiplies_exactly(self.args.device)
        return Kept(
            texts=texts,
            ids=[self.ids[i] for i in places],
            scores=torch.from_numpy(self.scores(texts)).float(),
            dtype=torch.bfloat16 if rounded else torch.float32,
        )

    def record(self, sets: Sets) -> Record:
        """How the texts were formed; without the texts that are kept."""
        formed, marker = sets.formed, reward_texts.special_token(self.tokenizer, self.ids)
        kind: Any = "marked" if marker and not formed.conversations else "plain"
        if formed.conversations:
            kind = "mixed" if formed.plain else "chat"
        turns, laid_out = formed.first if formed.first and kind == "chat" else (None, None)
        return Record(
            format=kind,
            marker=marker if kind == "marked" else None,
            turns=turns,
            laid_out=laid_out,
            max_tokens=self.max_tokens,
            truncation_side=self.tokenizer.truncation_side,
            around=reward_texts.around(self.tokenizer),
            precision="bf16" if self.args.bf16 else "fp32",
            texts=len(self.ids),
            cut=self.cut,
            probes=[],
        )

    def cut_note(self) -> list[str]:
        """A line to tell the user, if texts were cut."""
        if not self.cut:
            return []
        wanted = self.config.data.max_tokens
        limit = f"data.max_tokens={wanted}" if wanted == self.max_tokens else f"the {self.max_tokens} of this model"
        return [
            f"{self.cut} of {len(self.ids)} texts to learn from ({self.cut / len(self.ids):.0%}) have more tokens than "
            f"{limit} and were cut"
        ]

    def _learned_ids(self, learned: Feedback) -> tuple[list[list[int]], int]:
        """Ids of each text to learn from, and how many texts were cut."""
        rows, cut = reward_texts.encode(self.tokenizer, learned.texts, self.max_tokens)
        return [row["input_ids"] for row in rows], sum(cut)


@dataclass(frozen=True)
class _Collator:
    """Rows padded to the longest; of pairs first all preferred texts, then the others. One dtype of labels: whole
    numbers, classes or places, are int64; ratings and margins are fp32."""

    tokenizer: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows] + [row["rejected_ids"] for row in rows if "rejected_ids" in row]
        labels = torch.tensor([row["labels"] for row in rows])
        return {**self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"), "labels": labels}


class _Progress(transformers.TrainerCallback):  # type: ignore[misc]  # as FeedbackTrainer
    """A line for each tenth of the steps, and for each evaluation."""

    def __init__(self, objective: str = "ratings") -> None:
        self.loss = {"ratings": "squared error", "labels": "cross entropy", "pairs": "preference loss"}[objective]

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if args.eval_strategy == "steps" and state.eval_steps > state.max_steps:
            raise ConfigError(
                f"run.eval_every={state.eval_steps:g} is above the {state.max_steps} steps of this training, so that "
                "no model would be evaluated; lower it, or set 0 to write the last one",
                key="run.eval_every",
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        for key, place in (("loss", ""), ("eval_loss", " on the tuning rows")):
            if state.is_world_process_zero and logs and key in logs:
                what = f"{self.loss}{place} {float(logs[key]):.3f}"
                say(f"step {state.global_step}/{state.max_steps}  {what}")


def write_record(
    folder: Path,
    record: Record,
    labels: tuple[str, ...],
    kept: Kept,
    shift: float,
    scale: float,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write how texts were formed beside the model, with the training texts `kept` and the scores that the model as
    written gives them, formed and read as PPO will.

    Raises `RunFailed` if these are not (score - shift) / scale of what the model in memory gave, or if other ids are
    read than in training.
    """
    reward_texts.write(folder, record)
    alone = record.turns is not None and len(record.turns) == 1
    config = RewardConfig(
        model=str(folder),
        label=labels[0],
        dtype="fp32",
        batch_size=1,
        format="chat" if record.format == "chat" else "plain",
        text="response" if alone else "full",
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # what is kept should not depend on this machine
    try:
        classifier = Classifier(config, str(folder), torch.device("cpu"), trust_remote_code=trust_remote_code)
        rows, _ = reward_texts.encode(classifier.tokenizer, kept.texts, classifier.max_tokens)
        scores = torch.cat([classifier.logits([row]) for row in rows]) if rows else kept.scores
    finally:
        torch.set_float32_matmul_precision(before)
    ids = [row["input_ids"] for row in rows]
    # As they came out of the model in memory: what that rounded is a share of these, whatever is left less the shift.
    raw = scores * scale + shift
    finding = trained_scored(kept.texts, ids, raw, kept.ids, kept.scores, kept.dtype)
    if not finding.passed:
        raise RunFailed(f"the written model is not the trained one: {finding.message}. Nothing is written")
    probes = [
        Probe(text=text, ids=row, scores=said) for text, row, said in zip(kept.texts, ids, scores.tolist(), strict=True)
    ]
    reward_texts.write(folder, replace(record, probes=probes))


def tuning_loss(objective: str, tuning: Feedback, scores: np.ndarray) -> float:
    """What the best checkpoint has least of: mean squared error of ratings, else mean negative log-likelihood in nats.

    `scores` (N, K) are those of the tuning texts.
    """
    if objective == "ratings":
        assert tuning.targets is not None
        return float(np.mean((scores[:, 0] - tuning.targets) ** 2))
    return calibration.negative_log_likelihood(*_answers(objective, tuning, scores))


def figures(
    objective: str, tuning: Feedback, tuned: np.ndarray, held: Feedback, reported: np.ndarray
) -> tuple[dict[str, float], dict[str, calibration.Reliability]]:
    """What is reported of scores (N, K) of held-out texts, with a temperature fitted on the tuning texts' scores.

    Also the reliability of the probabilities before and after. Ratings and pairs: those of the preferences in pairs of
    texts; labels: those of the likeliest class.
    """
    found: dict[str, float] = {}
    if objective == "ratings":
        assert held.targets is not None
        found |= calibration.agreement(reported[:, 0], held.targets)
    logits, classes = _answers(objective, held, reported)
    name = "reward/accuracy" if objective == "labels" else "reward/pair_accuracy"
    found[name] = calibration.accuracy(logits, classes)
    temperature = calibration.fit_temperature(*_answers(objective, tuning, tuned))
    curves = {
        "before": calibration.reliability(logits, classes),
        "after": calibration.reliability(logits, classes, temperature),
    }
    found["reward/nll"] = calibration.negative_log_likelihood(logits, classes)
    found["reward/ece"] = curves["before"].error
    found["reward/ece_calibrated"] = curves["after"].error
    found["reward/temperature"] = temperature
    return found, curves


def _answers(objective: str, part: Feedback, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K) of answers and the right ones (N,): classes, or which text of a pair is preferred."""
    if objective == "labels":
        assert part.targets is not None
        return scores, part.targets
    return calibration.preference_logits(scores[:, 0], part.pairs), np.zeros(len(part.pairs), dtype=np.int64)


def _in_order(scores: Any, places: Any, count: int) -> np.ndarray:
    ordered = np.full((count, np.asarray(scores).shape[-1]), np.nan)
    ordered[np.asarray(places).reshape(-1)] = scores
    return ordered


def _normalization(config: RewardTrainingConfig, trainer: FeedbackTrainer, learned: Feedback) -> tuple[float, float]:
    """What model.normalize takes from the scores, and divides them by."""
    how = config.model.normalize
    if config.data.objective != "pairs" or how == "none":
        return 0.0, 1.0
    places = np.random.default_rng(_NORMALIZED_SEED).permutation(len(learned.texts))[:_NORMALIZED_TEXTS]
    scores = trainer.scores(tuple(learned.texts[i] for i in places))
    spread = float(scores.std())
    # Scores that are all the same are left as they are: there is nothing to learn from them, and the figures say so.
    return float(scores.mean()), 1.0 if how == "mean" or not spread > 0 else spread


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder beside the output, the same one for all processes, which is gone afterwards.

    Raises `RunFailed` where the disk refuses what the block writes.
    """
    made = [tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.work-") if _is_main() else ""]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(made)
    try:
        yield Path(made[0])
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{output} could not be written ({error}); make room, or name another run.output_dir"
        ) from error
    finally:
        if _is_main():
            shutil.rmtree(made[0], ignore_errors=True)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """With the lock of the folder, which lies beside it: the folder comes into being at the end.

    Raises `ConfigError` if another process trains towards the same folder.
    """
    if os.environ.get("RANK", "0") != "0":  # of a launch only the main process; they have not met yet
        yield
        return
    try:
        held = hold(output.parent / f".{output.name}.lock", f"run.output_dir={output}", "run.output_dir", say)
    except OSError as error:
        raise ConfigError(
            f"run.output_dir={output}: {output.parent} cannot be written ({error.strerror}); name another folder",
            key="run.output_dir",
        ) from error
    try:
        yield
    finally:
        held.release()


def _on_main(work: Callable[[], None]) -> None:
    """Let the main process do this while the others wait: what fails there ends them too, with a line that names it."""
    failed: BaseException | None = None
    if _is_main():
        try:
            work()
        except Exception as error:
            failed = error
    told = [None if failed is None else (str(failed).strip() or type(failed).__name__).splitlines()[0]]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told)
    if failed is not None:
        raise failed
    if told[0] is not None:
        raise RunFailed(f"the main process could not write the model: {told[0]}")


def _is_main() -> bool:
    """Whether this is the launch's main process, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _free_folder(config: RewardTrainingConfig) -> Path:
    output = Path(config.run.output_dir or Path("saved_models") / config.run.name).absolute()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"run.output_dir={output} is a file; name a folder", key="run.output_dir")
    if output.is_dir() and any(output.iterdir()):
        what = "already holds a model" if (output / "config.json").exists() else "is not empty"
        raise ConfigError(f"run.output_dir={output} {what}; name another folder, or remove it", key="run.output_dir")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.output_dir={output} cannot be made ({error.strerror}); name another folder", key="run.output_dir"
        ) from None
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(
            f"run.output_dir={output}: {output.parent} is not writable; name another folder", key="run.output_dir"
        )
    return output


def _arguments(config: RewardTrainingConfig, work: str) -> TrainingArguments:
    cuda = has_gpu()
    bf16 = config.run.precision == "bf16" or (
        config.run.precision == "auto" and computes_in_bf16(torch.device("cuda" if cuda else "cpu"))
    )
    # One process with several GPUs runs DataParallel, which takes a batch for each.
    devices = torch.cuda.device_count() if cuda and "LOCAL_RANK" not in os.environ else 1
    # The option was renamed after transformers 5.0.
    new_name = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if new_name else {"group_by_length": True}
    arguments = TrainingArguments(
        output_dir=work,
        seed=config.run.seed,
        bf16=bf16,
        use_cpu=not cuda,
        num_train_epochs=config.optim.epochs,
        per_device_train_batch_size=math.ceil(config.optim.batch_size / devices),
        per_device_eval_batch_size=64,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        warmup_steps=config.optim.warmup_ratio,  # below 1 it is a share of the steps
        lr_scheduler_type="linear",
        logging_steps=0.1,
        report_to="none",
        remove_unused_columns=False,  # what the collator makes of rows is ours
        # Without a GPU Accelerate sees several processes only if gloo is named.
        ddp_backend=None if cuda or int(os.environ.get("WORLD_SIZE", "1")) == 1 else "gloo",
        **_best_checkpoint(config.run.eval_every),
        **grouped,
    )
    if arguments.deepspeed_plugin is not None:  # else ZeRO-3 leaves cut weights where a model should be, and only warns
        zero = arguments.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return arguments


def _best_checkpoint(eval_every: float) -> dict[str, Any]:
    if eval_every == 0:
        return {"save_strategy": "no"}
    return {
        "eval_strategy": "steps",
        "eval_steps": eval_every if eval_every < 1 else int(eval_every),
        "save_strategy": "best",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        # DeepSpeed can load no checkpoint without the optimizer's state.
        "save_only_model": os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true",
    }


def main(arguments: list[str]) -> None:
    """The command `train-reward`: `[--config RECIPE_OR_FILE] [--print_config] [--section.key value …]`."""
    config = from_command_line(RewardTrainingConfig, arguments, REWARD_RECIPE)
    console.may_fail()
    tune_process()
    quiet_libraries()
    transformers.utils.logging.set_verbosity_error()  # it reports the new head, which is meant
    train_reward(config)
