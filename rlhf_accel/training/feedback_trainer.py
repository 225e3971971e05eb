"""The `Trainer` of transformers with the three objectives of reward models: ratings, labels and pairs.

Knows losses, batches and the arguments of the loop; knows no output folder and no metric.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from rlhf_accel.algorithm.calibration import preference_loss
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.data import reward_texts
from rlhf_accel.data.feedback import Feedback, Sets
from rlhf_accel.data.reward_texts import Record
from rlhf_accel.models import classifier as classifiers
from rlhf_accel.system.arithmetic import computes_in_bf16, exact_products, has_gpu
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.terminal import say
from rlhf_accel.training.reward_evaluation import Kept, tuning_loss
from rlhf_accel.training.reward_output import is_main


class FeedbackTrainer(Trainer):  # type: ignore[misc]  # mypy skips transformers, whose types are incomplete
    """The `Trainer` loop with the losses of the three objectives and an evaluation by the scores of texts."""

    def __init__(
        self, config: RewardTrainingConfig, arguments: TrainingArguments, model: Any, tokenizer: Any, sets: Sets
    ) -> None:
        self.config = config
        self.objective = config.data.objective
        self.tokenizer = tokenizer
        self.max_tokens = min(config.data.max_tokens, classifiers.most_tokens(model, tokenizer))
        chats = sets.formed.conversations and not sets.formed.plain
        self.ends = reward_texts.template_ends(tokenizer) if chats else None
        self.ids, self.cut = self._encoded(sets.train)
        evaluated = self._numbered(sets.tuning.texts) if config.run.eval_every else None

        def loss(prediction: transformers.EvalPrediction) -> dict[str, float]:
            scores = _in_order(prediction.predictions, prediction.label_ids, len(sets.tuning.texts))
            return {"loss": tuning_loss(self.objective, sets.tuning, scores)}

        self._tuning_metrics = loss
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self._examples(sets.train),
            eval_dataset=evaluated,
            data_collator=_Collator(tokenizer),
            processing_class=tokenizer,
            compute_metrics=loss,  # for evaluate(); scores() disables it
            callbacks=[_Progress(config.data.objective)],
        )
        for noisy in (transformers.trainer_callback.PrinterCallback, transformers.trainer_callback.ProgressCallback):
            self.remove_callback(noisy)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Mean over the rows of the batch; gradients are averaged over processes."""
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
        self.compute_metrics = None  # it is for the tuning texts only
        try:
            found = self.predict(self._numbered(texts))
        finally:
            self.compute_metrics = self._tuning_metrics
        scores = _in_order(found.predictions, found.label_ids, len(texts))
        if not np.isfinite(scores).all():
            raise RunFailed(
                f"the model scores {scores[~np.isfinite(scores)][0]} after training, which diverged; lower optim.lr. "
                "Nothing is written"
            )
        return scores

    def _numbered(self, texts: tuple[str, ...]) -> list[dict[str, Any]]:
        """Texts with their positions: the Trainer groups them by length, which changes their order."""
        rows, _ = reward_texts.encode(self.tokenizer, texts, self.max_tokens, self.ends)
        return [{"input_ids": row["input_ids"], "labels": i} for i, row in enumerate(rows)]

    def _examples(self, train: Feedback) -> list[dict[str, Any]] | datasets.Dataset:
        ids = self.ids
        if train.targets is not None:
            return [{"input_ids": row, "labels": t} for row, t in zip(ids, train.targets.tolist(), strict=True)]
        pairs = [
            {"input_ids": ids[chosen], "rejected_ids": ids[rejected], "labels": margin}
            for (chosen, rejected), margin in zip(train.pairs.tolist(), train.margins.tolist(), strict=True)
        ]
        different = [pair for pair in pairs if pair["input_ids"] != pair["rejected_ids"]]
        if not different:
            raise ConfigError(
                f"data.max_tokens={self.max_tokens}: the two texts of every pair are the same in their first "
                f"{self.max_tokens} tokens; raise it",
                key="data.max_tokens",
            )
        if len(different) < len(pairs) and is_main():
            say(
                f"{len(pairs) - len(different)} of {len(pairs)} pairs are left out: their texts are the same in their "
                f"first data.max_tokens={self.max_tokens} tokens"
            )
        # The Trainer batches rows of similar length. If the length were that of the preferred text, all preferred texts
        # of a batch would be long, or all short, and the model would be trained to score length.
        longer = [max(len(pair["input_ids"]), len(pair["rejected_ids"])) for pair in different]
        return datasets.Dataset.from_list(different).add_column("length", longer)

    def texts_to_keep(self, train: Feedback) -> Kept:
        """The texts for the record beside the model. All processes must call it."""
        short = [len(text) <= reward_texts.LONGEST_PROBE for text in train.texts]
        places = reward_texts.spread([len(ids) for ids in self.ids], short)
        texts = tuple(train.texts[i] for i in places)
        # In fp32 and without autocast: bf16 rounds a decoder's scores by several percent, which would hide a fault.
        with exact_products(), without_autocast(self.model):
            scores = torch.from_numpy(self.scores(texts)).float()
        return Kept(
            texts=texts,
            ids=[self.ids[i] for i in places],
            scores=scores,
            dtype=classifiers.output_layer(self.model).weight.dtype,
        )

    def record(self, sets: Sets) -> Record:
        """How the texts were formed, without the kept texts."""
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
            ends=self.ends,
            precision="bf16" if self.args.bf16 else "fp32",
            texts=len(self.ids),
            cut=self.cut,
            probes=[],
        )

    def cut_note(self) -> list[str]:
        """A message for the user if texts were cut."""
        if not self.cut:
            return []
        wanted = self.config.data.max_tokens
        limit = f"data.max_tokens={wanted}" if wanted == self.max_tokens else f"the {self.max_tokens} of this model"
        return [
            f"{self.cut} of {len(self.ids)} training texts ({self.cut / len(self.ids):.0%}) have more tokens than "
            f"{limit} and were cut"
        ]

    def _encoded(self, train: Feedback) -> tuple[list[list[int]], int]:
        """Ids of each training text, and the number of texts that were cut."""
        rows, cut = reward_texts.encode(self.tokenizer, train.texts, self.max_tokens, self.ends)
        return [row["input_ids"] for row in rows], sum(cut)


@dataclass(frozen=True)
class _Collator:
    """Rows padded to the longest; for pairs first all preferred texts, then the others. Labels that are classes or
    positions are int64, ratings and margins fp32."""

    tokenizer: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows] + [row["rejected_ids"] for row in rows if "rejected_ids" in row]
        labels = torch.tensor([row["labels"] for row in rows])
        return {**self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"), "labels": labels}


class _Progress(transformers.TrainerCallback):  # type: ignore[misc]  # as FeedbackTrainer
    """Prints a line after each tenth of the steps, and after each evaluation."""

    def __init__(self, objective: str = "ratings") -> None:
        self.loss = {"ratings": "squared error", "labels": "cross entropy", "pairs": "preference loss"}[objective]

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if args.eval_strategy == "steps" and state.eval_steps > state.max_steps:
            raise ConfigError(
                f"run.eval_every={state.eval_steps:g} is above the {state.max_steps} steps of this training, so "
                "no model would be evaluated; lower it, or set 0 to write the last one",
                key="run.eval_every",
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        for key, place in (("loss", ""), ("eval_loss", " on the tuning rows")):
            if state.is_world_process_zero and logs and key in logs:
                say(f"step {state.global_step}/{state.max_steps}  {self.loss}{place} {float(logs[key]):.3f}")


@contextlib.contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside the context, `forward` is that of the model's class, and not Accelerate's, which runs it in autocast."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


def _in_order(scores: Any, places: Any, count: int) -> np.ndarray:
    ordered = np.full((count, np.asarray(scores).shape[-1]), np.nan)
    ordered[np.asarray(places).reshape(-1)] = scores
    return ordered


def training_arguments(config: RewardTrainingConfig, work: str) -> TrainingArguments:
    """The arguments of the `Trainer`, which writes its checkpoints to `work`."""
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
        remove_unused_columns=False,  # the collator needs all columns
        # Without a GPU, Accelerate uses several processes only if the backend is gloo.
        ddp_backend=None if cuda or int(os.environ.get("WORLD_SIZE", "1")) == 1 else "gloo",
        **_best_checkpoint(config.run.eval_every),
        **grouped,
    )
    if arguments.deepspeed_plugin is not None:
        # Otherwise ZeRO-3 would save sharded weights instead of a model, and only warn.
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
        # DeepSpeed cannot load a checkpoint without the state of the optimizer.
        "save_only_model": os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true",
    }
