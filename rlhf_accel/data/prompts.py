"""Prompts from the hub, local files or the embedded data, as typed batches in an order that the seed fixes.

The batch of a step depends on (seed, step) only, so a resumed run needs no saved position, and every process builds the
same batch. Knows no model and no rank.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.config.schema import DataConfig
from rlhf_accel.data import embedded
from rlhf_accel.data.rows import READERS, Table, read_file
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.system.errors import ConfigError, first_line

_ARGUMENTS = ("prompts", "responses")  # of every reward function; columns are passed to it by name beside them

# Streams of random numbers, told apart by their first entropy word.
_ORDER, _LENGTH, _FIXED_LENGTH, _FIXED_ORDER = 1, 2, 3, 5


def load_rows(
    source: str,
    split: str,
    max_samples: int | None = None,
    *,
    source_key: str = "data.source",
    split_key: str = "data.split",
) -> Table:
    """Rows of `embedded:NAME`, of a .jsonl, .csv, .parquet or .txt file, or of a hub data set's split; the first
    `max_samples` of them.

    Raises `ConfigError` if nothing can be read, naming `source_key` or `split_key`, the keys of these two settings.
    """
    name = source.removeprefix("embedded:")
    if name != source:
        rows: Table = embedded.embedded_dataset(name, split)
    elif is_file_name(source):
        if split != "train":
            raise ConfigError(
                f"{split_key}={split}: the file {source} has no splits; remove {split_key}", key=split_key, split=split
            )
        rows = _load_file(source, source_key, max_samples)
    else:
        rows = _load_hub(source, split, source_key, split_key)
    if len(rows) == 0:
        raise ConfigError(f"{source_key}={source} holds no rows; name one that has some", key=source_key, source=source)
    return rows.select(range(min(max_samples or len(rows), len(rows))))


def is_file_name(source: str) -> bool:
    """Whether the name of a source is that of a file, not of a hub id, a folder or embedded data."""
    return Path(source).suffix.lower() in READERS


def checked_texts(rows: Table, source: str, text_field: str) -> list[str]:
    """The column of texts; raises `ConfigError` if it is absent, or for the first row without a text."""
    if text_field not in rows.column_names:
        raise ConfigError(
            f"data.text_field={text_field} is not a column of {source}; it has {', '.join(rows.column_names)}",
            key="data.text_field",
            columns=rows.column_names,
        )
    texts = list(rows[text_field])
    for number, text in enumerate(texts, start=1):
        if not _is_text(text):
            fix = "remove the row or choose another data.text_field"
            if isinstance(text, list) and text and isinstance(text[0], dict):
                fix = "write the conversations into a column of texts by the policy's chat template, and name that one"
            raise ConfigError(
                f"data.text_field={text_field}: row {number} of {source} has no text there (found {text!r:.40}); {fix}",
                key="data.text_field",
                row=number,
            )
    return texts


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: valid in JSON, but no tokenizer reads it
        return False
    return True


def _check_column_names(rows: Table, source: str, source_key: str, text_field: str) -> None:
    taken = [name for name in rows.column_names if name in _ARGUMENTS and name != text_field]
    if taken:
        raise ConfigError(
            f"{source_key}={source} has a column {taken[0]}, but every reward function already has an argument of "
            "this name; rename the column",
            key=source_key,
            column=taken[0],
        )


def held_out(text: str) -> bool:
    """Whether a text is in the fixed tenth that is held out if data.eval_split is not set."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def split_rows(config: DataConfig) -> tuple[Table, Table]:
    """Rows to train on and rows held out from training.

    Without data.eval_split, the latter may be empty if there are few texts.
    """
    rows = load_rows(config.source, config.split, config.max_samples)
    texts = checked_texts(rows, config.source, config.text_field)
    _check_column_names(rows, config.source, "data.source", config.text_field)
    if config.eval_split is not None:
        return rows, _eval_rows(config, config.eval_split)
    train = [i for i, text in enumerate(texts) if not held_out(text)]
    held_rows = [i for i, text in enumerate(texts) if held_out(text)]
    return (rows.select(train), rows.select(held_rows)) if train else (rows, rows.select([]))


def _eval_rows(config: DataConfig, eval_split: str) -> Table:
    if is_file_name(eval_split):
        held = load_rows(eval_split, "train", source_key="data.eval_split")
        checked_texts(held, eval_split, config.text_field)
        _check_column_names(held, eval_split, "data.eval_split", config.text_field)
        return held
    if is_file_name(config.source):
        raise ConfigError(
            f"data.eval_split={eval_split}: data.source={config.source} is a file, which has no splits; name another "
            "file, or set data.eval_split=null to hold out a tenth of this one",
            key="data.eval_split",
        )
    held = load_rows(config.source, eval_split, split_key="data.eval_split")
    checked_texts(held, config.source, config.text_field)
    return held


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of a run: `batch(step, size)` for training, `fixed(count)` for evaluation.

    Both raise `ConfigError` for a text of which the tokenizer makes no token.
    """

    rows: Table
    tokens: Tokens
    config: DataConfig
    max_prompt_tokens: int
    seed: int

    @classmethod
    def of(cls, rows: Table, tokens: Tokens, config: DataConfig, max_prompt_tokens: int, seed: int) -> Prompts:
        """The prompts in `rows`. Without data.prompt_tokens, rows that are too long are left out with a warning.

        Raises `ConfigError` if none is left, or if the tokenizer makes no token of a text.
        """
        if config.prompt_tokens is None:
            encoded = _encoded(checked_texts(rows, config.source, config.text_field), tokens, config)
            lengths = [len(ids) - len(tokens.prefix) for ids in encoded]
            short = [i for i, length in enumerate(lengths) if length <= max_prompt_tokens]
            if not short:
                raise ConfigError(
                    f"rollout.max_prompt_tokens={max_prompt_tokens}: all {len(rows)} prompts of {config.source} are "
                    f"longer (the shortest has {min(lengths)} tokens); raise it or set data.prompt_tokens",
                    key="rollout.max_prompt_tokens",
                    shortest=min(lengths),
                )
            if len(short) < len(rows):
                warnings.warn(
                    f"{len(rows) - len(short)} of {len(rows)} prompts of {config.source} are longer than "
                    f"rollout.max_prompt_tokens={max_prompt_tokens} and left out",
                    stacklevel=2,
                )
            rows = rows.select(short)
        return cls(rows=rows, tokens=tokens, config=config, max_prompt_tokens=max_prompt_tokens, seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, size: int) -> PromptBatch:
        """The prompts of a step, counted from 1: the next `size` of an endless series of shuffled passes."""
        start, end = (step - 1) * size, step * size
        first, last = start // len(self), (end - 1) // len(self)
        order = np.concatenate([self._pass(number) for number in range(first, last + 1)])
        rows = order[start - first * len(self) : end - first * len(self)].tolist()
        return self._prompts(rows, np.random.default_rng((_LENGTH, self.seed, step)))

    def fixed(self, count: int) -> PromptBatch:
        """The same `count` rows at the same lengths for every seed of a run, so that runs can be compared.

        They are drawn at random, since many data sets are sorted by label. A larger `count` contains a smaller one.
        """
        order = np.random.default_rng(_FIXED_ORDER).permutation(len(self))[:count]
        return self._prompts(order.tolist(), np.random.default_rng(_FIXED_LENGTH))

    def some_texts(self, count: int) -> list[str]:
        """Whole texts of `count` rows drawn at random, or of all rows if there are fewer."""
        order = np.random.default_rng(_FIXED_ORDER).permutation(len(self))[:count]
        return list(self.rows[order.tolist()][self.config.text_field])

    def _pass(self, number: int) -> np.ndarray:
        return np.random.default_rng((_ORDER, self.seed, number)).permutation(len(self))

    def _prompts(self, rows: Sequence[int], lengths: np.random.Generator) -> PromptBatch:
        chosen: dict[str, list[Any]] = self.rows[list(rows)]
        low, high = self.config.prompt_tokens or (self.max_prompt_tokens, self.max_prompt_tokens)
        limits = lengths.integers(low, high, size=len(rows), endpoint=True)
        texts = chosen.pop(self.config.text_field)
        encoded = _encoded(texts, self.tokens, self.config)
        return prompt_batch(
            [ids[: limit + len(self.tokens.prefix)] for ids, limit in zip(encoded, limits, strict=True)],
            self.tokens,
            chosen,
        )


def _encoded(texts: Sequence[str], tokens: Tokens, config: DataConfig) -> list[list[int]]:
    """The ids of each text; raises `ConfigError` for the first text without any."""
    encoded = tokens.encode(texts)
    if [] in encoded:
        raise ConfigError(
            f"data.text_field={config.text_field}: the tokenizer makes no token of the text "
            f"{texts[encoded.index([])]!r:.40} of {config.source}; remove the row",
            key="data.text_field",
        )
    return encoded


def prompt_batch(
    ids: Sequence[Sequence[int]], tokens: Tokens, columns: dict[str, list[Any]] | None = None
) -> PromptBatch:
    """Rows of prompt ids as a batch; the texts of the prompts are decoded from their ids."""
    queries, query_mask = tokens.pad_left(ids)
    return PromptBatch(
        queries=queries,
        query_mask=query_mask,
        index=torch.arange(len(ids)),
        sample=torch.arange(len(ids)),
        texts=tuple(tokens.text(row) for row in ids),
        columns={name: tuple(column) for name, column in (columns or {}).items()},
    )


def own_prompts(texts: Sequence[str], tokens: Tokens) -> PromptBatch:
    """Whole prompts from a caller; raises `ConfigError` if there are none, or for the first one without a text."""
    if isinstance(texts, str):
        raise ConfigError(f"expected a list of prompts, and found one text: {texts!r:.40}; put it into a list")
    texts = list(texts)
    if not texts:
        raise ConfigError("there are no prompts; give at least one")
    encoded = [tokens.encode([text])[0] if _is_text(text) else [] for text in texts]
    if [] in encoded:
        number = encoded.index([])
        raise ConfigError(
            f"prompt {number + 1} of {len(texts)} has no text (found {texts[number]!r:.40})", prompt=number + 1
        )
    return prompt_batch(encoded, tokens)


def _load_file(source: str, key: str, most: int | None) -> Table:
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{key}={source}: no such file", key=key)
    if path.stat().st_size == 0:
        raise ConfigError(f"{key}={source} holds no rows; name one that has some", key=key)
    try:
        return read_file(path, most)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{key}={source}: cannot be read as {path.suffix} ({reason})", key=key) from error


def _load_hub(source: str, split: str, source_key: str, split_key: str) -> Table:
    try:
        with _quiet_readers():
            rows: Table = datasets.load_dataset(source, split=split)
            return rows
    except Exception as error:  # errors of network, permission and format have many types
        reason = first_line(error)
        if isinstance(error, ValueError) and reason.startswith(("Unknown split", "Unrecognized instruction")):
            raise ConfigError(f"{split_key}={split}: {reason}", key=split_key) from error
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        if _is_refused(error, cache):
            raise ConfigError(
                f"{cache}, the cache of data sets, cannot be written ({getattr(error, 'strerror', None) or reason}); "
                "set HF_HOME to a writable folder",
                key="HF_HOME",
                cache=str(cache),
            ) from error
        raise ConfigError(
            f"{source_key}={source}: neither a .jsonl, .csv, .parquet or .txt file nor a data set on the hub or "
            f"in its cache ({reason})",
            key=source_key,
        ) from error


def _is_refused(error: Exception, folder: Path) -> bool:
    """Whether the system refused to write in this folder, or to create it or one of its parents."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return False
    place = Path(error.filename)
    return folder.is_relative_to(place) or place.is_relative_to(folder)


@contextmanager
def _quiet_readers() -> Iterator[None]:
    """Silence the messages that `datasets` logs before it raises an error with the same text."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
