"""Reward-model training: an encoder learns to give a text the mean rating that people gave it.

The loop is transformers' `Trainer`; this file knows the data it gets, the figures that are reported and the folder that
`reward.model` takes. Knows no PPO.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from rlhf_accel import assets, data
from rlhf_accel.config import ConfigError, RewardTrainingConfig, from_command_line, to_yaml
from rlhf_accel.runtime import computes_in_bf16, quiet_libraries, tune_process

# Two texts are a pair for the pairwise agreement when their mean ratings are further apart than this: closer ones are
# within what another group of raters would have said.
PAIR_MARGIN = 0.5

# (text, mean rating) of each row.
Ratings = list[tuple[str, float]]


def train_reward(config: RewardTrainingConfig) -> dict[str, float]:
    """Train, evaluate on data.eval_split and write the folder run.output_dir; returns what its metrics file holds.

    Raises `ConfigError` before any training on an output folder in use, data that cannot be learned from, or a model
    that cannot be loaded.
    """
    output = _free_folder(config)
    learned, held = _ratings(config)
    transformers.set_seed(config.run.seed)  # the new head
    model, tokenizer = _load(config)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.work-") as work:
        trainer = Trainer(
            model=model,
            args=_arguments(config, work),
            train_dataset=_encoded(learned, tokenizer, config.data.max_tokens),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=[_Progress()],
        )
        for noisy in (transformers.trainer_callback.PrinterCallback, transformers.trainer_callback.ProgressCallback):
            trainer.remove_callback(noisy)
        seconds = trainer.train().metrics["train_runtime"]
        # The Trainer groups this set by length too, so that rows come back in another order: with their labels.
        result = trainer.predict(_encoded(held, tokenizer, config.data.max_tokens))
        predictions, targets = (np.asarray(x, dtype=np.float64).reshape(-1) for x in result[:2])
        metrics = {
            **agreement(predictions, targets),
            "time/train": round(float(seconds), 1),
            "reward/train_rows": len(learned),
            "reward/eval_rows": len(held),
        }
        finished = Path(work) / "model"
        trainer.save_model(str(finished))
        if trainer.is_world_process_zero():
            _describe(finished, config, metrics)
            if output.exists():
                output.rmdir()  # empty: _free_folder looked
            finished.rename(output)
            print("\n".join(f"{name:28} {value:.4g}" for name, value in metrics.items()))
            print(f"wrote {output}, which reward.model takes")
    return metrics


def agreement(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """How well predictions (N,) agree with mean ratings (N,); nan where no row or pair can tell.

    `reward/accuracy`: share of rows whose sign is right, rows rated exactly 0 left out. `reward/pairwise_agreement`:
    share of the pairs rated more than `PAIR_MARGIN` apart that are ordered the same way, ties counting as wrong.

    >>> agreement(np.array([2.0, 1.0, -3.0]), np.array([1.0, 2.0, -1.0]))["reward/pairwise_agreement"]
    0.6666666666666666
    """
    signed = targets != 0
    right = (predictions > 0) == (targets > 0)
    pairs = ordered = 0
    for prediction, target in zip(predictions, targets, strict=True):
        below = target - targets > PAIR_MARGIN
        pairs += int(below.sum())
        ordered += int((predictions[below] < prediction).sum())
    spread = len(targets) > 1 and predictions.std() > 0 and targets.std() > 0
    return {
        "reward/accuracy": float(right[signed].mean()) if signed.any() else math.nan,
        "reward/pairwise_agreement": ordered / pairs if pairs else math.nan,
        "reward/mse": float(np.mean((predictions - targets) ** 2)),
        "reward/pearson": float(np.corrcoef(predictions, targets)[0, 1]) if spread else math.nan,
    }


def _free_folder(config: RewardTrainingConfig) -> Path:
    output = Path(config.run.output_dir or Path("saved_models") / config.run.name)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"run.output_dir={output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        what = "already holds a model" if (output / "config.json").exists() else "is not empty"
        raise ConfigError(f"run.output_dir={output} {what}; name another folder, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output_dir={output} cannot be made ({error.strerror}); name another folder") from None
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"run.output_dir={output}: {output.parent} is not writable; name another folder")
    return output


def _ratings(config: RewardTrainingConfig) -> tuple[Ratings, Ratings]:
    """What to learn from, and what to report on. A file has no splits: it keeps a fixed tenth back by its texts, unless
    data.eval_split names another file."""
    source, eval_split, limit = config.data.source, config.data.eval_split, config.data.max_samples
    all_ratings = _checked(data.load_rows(source, config.data.split, limit), source, config)
    if data.is_file_name(eval_split):
        held_rows = data.load_rows(eval_split, "train", limit, source_key="data.eval_split")
        return all_ratings, _checked(held_rows, eval_split, config)
    if not data.is_file_name(source):
        held_rows = data.load_rows(source, eval_split, limit, split_key="data.eval_split")
        return all_ratings, _checked(held_rows, source, config)
    held = [rating for rating in all_ratings if data.held_out(rating[0])]
    learned = [rating for rating in all_ratings if not data.held_out(rating[0])]
    if not held or not learned:
        raise ConfigError(
            f"data.source={source}: its {len(all_ratings)} rows are too few to keep a tenth for the report; add rows, "
            "or name another file in data.eval_split"
        )
    return learned, held


def _checked(rows: datasets.Dataset, source: str, config: RewardTrainingConfig) -> Ratings:
    field = config.data.target_field
    texts = data.checked_texts(rows, source, config.data.text_field)
    if field not in rows.column_names:
        raise ConfigError(
            f"data.target_field={field} is not a column of {source}; it has {', '.join(rows.column_names)}"
        )
    targets = list(rows[field])
    for number, target in enumerate(targets, start=1):
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target):
            raise ConfigError(
                f"data.target_field={field}: row {number} of {source} holds {target!r:.40}, expected a finite number"
            )
    return [(text, float(target)) for text, target in zip(texts, targets, strict=True)]


def _load(config: RewardTrainingConfig) -> tuple[Any, Any]:
    name = config.model.name_or_path
    path = assets.resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            num_labels=1,
            problem_type="regression",
            id2label={0: config.data.target_field},
            label2id={config.data.target_field: 0},
            # A classifier with more labels gets a new head.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.name_or_path={name}: neither a folder with a model and its tokenizer nor one that the hub or its "
            f"cache gave ({reason})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    # One epoch over ratings does not overfit, and attention without dropout takes torch's fast path on a CPU.
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return model, tokenizer


def _encoded(ratings: Ratings, tokenizer: Any, max_tokens: int) -> list[dict[str, Any]]:
    ids = tokenizer([text for text, _ in ratings], truncation=True, max_length=max_tokens)["input_ids"]
    return [{"input_ids": row, "labels": target} for row, (_, target) in zip(ids, ratings, strict=True)]


def _arguments(config: RewardTrainingConfig, work: str) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    bf16 = config.run.precision == "bf16" or (
        config.run.precision == "auto" and computes_in_bf16(torch.device("cuda" if cuda else "cpu"))
    )
    # One process with several GPUs runs DataParallel, which takes a batch for each.
    devices = 1 if "LOCAL_RANK" in os.environ else max(1, torch.cuda.device_count())
    # The option was renamed after transformers 5.0.
    new_name = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if new_name else {"group_by_length": True}
    return TrainingArguments(
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
        save_strategy="no",
        report_to="none",
        **grouped,
    )


class _Progress(transformers.TrainerCallback):
    """A line for each tenth of the steps."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}  squared error {float(logs['loss']):.3f}", flush=True)


def _describe(folder: Path, config: RewardTrainingConfig, metrics: dict[str, float]) -> None:
    numbers = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    (folder / "reward_metrics.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    (folder / "reward_config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing reads it
    card = f"""# Reward model

Gives a text a number, the `{config.data.target_field}` that people would give it: one output, no activation. Trained
with `python -m rlhf_accel train-reward` from `{config.model.name_or_path}` on the split `{config.data.split}` of
`{config.data.source}` by squared error (`reward_config.yaml`).

| figure on `{config.data.eval_split}` | value |
| --- | --- |
""" + "".join(f"| `{name}` | {value:.4g} |\n" for name, value in metrics.items())
    if config.data.source == "embedded:movie_reviews":
        card += """
The human ratings are from C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014 (MIT licence); the snippets are from the review corpus of B. Pang and L. Lee, ACL 2004.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """The command `train-reward`: `[--config RECIPE_OR_FILE] [--print_config] [--section.key value …]`."""
    config = from_command_line(RewardTrainingConfig, arguments, assets.REWARD_RECIPE)
    tune_process()
    quiet_libraries()
    transformers.utils.logging.set_verbosity_error()  # it reports the new head, which is meant
    train_reward(config)
