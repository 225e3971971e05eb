"""Checks of a loaded classifier: it scores as in its training, a text alone as in a batch, and the longest text.

Each raises `ConfigError`. Knows probes and the record of the training; changes nothing in the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from rlhf_accel.data import reward_texts
from rlhf_accel.data.reward_texts import Record
from rlhf_accel.models.classifier import has_position_table
from rlhf_accel.models.probes import scored_alone, trained_scored
from rlhf_accel.system.arithmetic import exact_products
from rlhf_accel.system.errors import ConfigError, first_line

if TYPE_CHECKING:
    from rlhf_accel.reward.classifier import Classifier

_LONGEST_TRIED = 4096  # tokens
_TEXTS = ["A film.", "The film is long, and it is worth every minute of it.", "It is dull. " * 12]


def check(classifier: Classifier, sample_tokens: tuple[int, int] | None) -> None:
    """All checks; `sample_tokens` as in `Classifier`."""
    if classifier.record is not None:
        _check_record(classifier, classifier.record)
    rows, _ = reward_texts.encode(classifier.tokenizer, _TEXTS, classifier.max_tokens)
    if has_position_table(classifier.model):
        _check_longest(classifier, sample_tokens)
    _check_finite(classifier, rows)
    if classifier.config.batch_size > 1:
        finding = scored_alone(classifier.logits, rows, classifier.dtype)
        if not finding.passed:
            raise ConfigError(
                f"{classifier.setting}: {finding.message} (more than {finding.limit:.2g}): "
                f"{type(classifier.model).__name__} reads padding; set reward.batch_size=1, or use another model",
                key="reward.batch_size",
                difference=finding.difference,
            )


def _check_record(classifier: Classifier, record: Record) -> None:
    """Tokenizer, chat template and scores are those of the training."""
    setting, tokenizer = classifier.setting, classifier.tokenizer
    around = reward_texts.around(tokenizer)
    if around != record.around:
        raise ConfigError(
            f"{setting}: its tokenizer puts {around} around every text, and in training it put {record.around}; "
            "restore the tokenizer of the training",
            key="reward.model",
        )
    if classifier.format == record.format == "chat" and record.turns is not None:
        now = reward_texts.lay_out(tokenizer, record.turns)
        if now != record.laid_out:
            raise ConfigError(
                f"{setting}: its chat template turns a conversation of the training into {now!r:.80}, and in training "
                f"it gave {record.laid_out!r:.80}; restore the tokenizer of the training, remove reward.chat_template, "
                "or train again",
                key="reward.model",
            )
    outputs = classifier.model.config.num_labels
    if any(len(probe.scores) != outputs for probe in record.probes):
        raise ConfigError(
            f"{setting} has {outputs} outputs, and its {reward_texts.FILE} records another number of scores; restore "
            "the files of the training",
            key="reward.model",
        )
    texts = [probe.text for probe in record.probes]
    rows, _ = classifier.encoded(texts)
    # In fp32 the products are exact, as when the scores were recorded; bf16 and fp16 round as they will in the run.
    with exact_products():
        scores = torch.cat([classifier.logits([row]) for row in rows]) if rows else torch.zeros(0, 1)
        then = torch.tensor([probe.scores for probe in record.probes]) if rows else scores
        ids = [row["input_ids"] for row in rows]
        finding = trained_scored(texts, ids, scores, [probe.ids for probe in record.probes], then, classifier.dtype)
    if not finding.passed:
        cause, remedy = "its weights have changed", "restore the files of the training"
        if finding.unit == "texts":
            cause = "its tokenizer has changed"
        elif classifier.dtype != torch.float32:
            cause += f", or {str(classifier.dtype).removeprefix('torch.')} rounds too much"
            remedy += ", or set reward.dtype=fp32"
        raise ConfigError(
            f"{setting}: {finding.message}: {cause}; {remedy}",
            key="reward.model",
            difference=finding.difference,
        )


def _check_longest(classifier: Classifier, sample_tokens: tuple[int, int] | None) -> None:
    """A text of the most tokens that the model is expected to read, or that a run sends: its position table may be
    shorter."""
    tokens = min(classifier.max_tokens, _LONGEST_TRIED)
    if sample_tokens is not None:
        # Twice: this tokenizer may make more tokens of a text than the policy's, and a chat template adds some.
        tokens = min(tokens, 2 * classifier.tokens_read(*sample_tokens))
    rows, _ = reward_texts.encode(classifier.tokenizer, ["a film " * tokens], tokens)
    try:
        _check_finite(classifier, rows)
    except torch.OutOfMemoryError:  # a RuntimeError too, but not a fault of the model
        raise
    except (IndexError, RuntimeError) as error:  # on a GPU an index out of range is a RuntimeError
        known = classifier.model.get_input_embeddings().weight.shape[0]
        if max(rows[0]["input_ids"]) >= known:
            raise ConfigError(
                f"{classifier.setting}: its tokenizer has {len(classifier.tokenizer)} ids, and the model {known} "
                "embeddings, so the tokenizer is another model's; save the right one beside it",
                key="reward.model",
            ) from error
        raise ConfigError(
            f"{classifier.setting} cannot read a text of {tokens} tokens, although its files allow it "
            f"({first_line(error)}); set model_max_length in its tokenizer_config.json to the tokens it reads",
            key="reward.model",
            tokens=tokens,
        ) from error


def _check_finite(classifier: Classifier, rows: Sequence[Mapping[str, Sequence[int]]]) -> None:
    if all(classifier.logits([row]).isfinite().all() for row in rows):
        return
    half = classifier.dtype == torch.float16
    why = "which overflows; set reward.dtype to bf16 or fp32" if half else "so its weights are damaged"
    dtype = str(classifier.dtype).removeprefix("torch.")
    raise ConfigError(
        f"{classifier.setting}: the score of an ordinary text is not finite in {dtype}, {why}",
        key="reward.dtype" if half else "reward.model",
        dtype=dtype,
    )
