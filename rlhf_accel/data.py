"""Prompts from a data set: hub, local files or the embedded reviews, as typed batches in an order fixed by the seed.

The batch of a step is a function of (seed, step) alone, so nothing has to be remembered to resume, and every process
builds the same one. Knows no model and no rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from rlhf_accel import assets
from rlhf_accel.config import ConfigError, DataConfig
from rlhf_accel.tokens import Tokens
from rlhf_accel.types import PromptBatch

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

# Streams of random numbers, told apart by their first entropy word.
_ORDER, _LENGTH, _EVAL_LENGTH = 1, 2, 3


def load_rows(source: str, split: str, max_samples: int | None = None) -> datasets.Dataset:
    """Rows of `embedded:NAME`, of a .jsonl, .csv, .parquet or .txt file (one row a line), or of a hub data set's split.

    Raises `ConfigError` naming data.source or data.split when nothing can be read.
    """
    name = source.removeprefix("embedded:")
    if name != source:
        rows = assets.embedded_dataset(name, split)
    elif Path(source).suffix in LOADERS:
        rows = _load_file(source)
    else:
        rows = _load_hub(source, split)
    if len(rows) == 0:
        raise ConfigError(f"data.source={source} holds no rows; name one that has some")
    return rows.select(range(min(max_samples or len(rows), len(rows))))


def checked_texts(rows: datasets.Dataset, source: str, text_field: str) -> list[str]:
    """The column of texts; raises `ConfigError` if it is absent or a row holds no text, naming the first such row."""
    if text_field not in rows.column_names:
        raise ConfigError(
            f"data.text_field={text_field} is not a column of {source}; it has {', '.join(rows.column_names)}"
        )
    texts = list(rows[text_field])
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f"data.source={source}: row {number} has no text in the column {text_field} (found {text!r:.40}); "
                "remove the row or choose another data.text_field"
            )
    return texts


def held_out(text: str) -> bool:
    """Whether a text belongs to the fixed tenth that is held out when data.eval_split is not given."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def split_rows(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on and rows held out from training."""
    rows = load_rows(config.source, config.split, config.max_samples)
    texts = checked_texts(rows, config.source, config.text_field)
    if config.eval_split is not None:
        other_file = Path(config.eval_split).suffix in LOADERS
        source = config.eval_split if other_file else config.source
        held = load_rows(source, config.eval_split)
        checked_texts(held, source, config.text_field)
        return rows, held
    train = [i for i, text in enumerate(texts) if not held_out(text)]
    held_rows = [i for i, text in enumerate(texts) if held_out(text)]
    return rows.select(train or held_rows), rows.select(held_rows)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of a run: `batch(step)` for training, `first(n)` for evaluation."""

    rows: datasets.Dataset
    tokens: Tokens
    config: DataConfig
    max_prompt_tokens: int
    seed: int

    @classmethod
    def of(
        cls, rows: datasets.Dataset, tokens: Tokens, config: DataConfig, max_prompt_tokens: int, seed: int
    ) -> Prompts:
        """Leaves out rows that are too long to be a whole prompt; raises `ConfigError` if none is left."""
        if config.prompt_tokens is None:
            texts = checked_texts(rows, config.source, config.text_field)
            lengths = [len(ids) for ids in tokens.encode(texts)]
            short = [i for i, length in enumerate(lengths) if 0 < length <= max_prompt_tokens]
            if not short:
                raise ConfigError(
                    f"rollout.max_prompt_tokens={max_prompt_tokens}: all {len(rows)} prompts of {config.source} are "
                    f"longer (the shortest has {min(lengths)} tokens); raise it or set data.prompt_tokens"
                )
            rows = rows.select(short)
        return cls(rows=rows, tokens=tokens, config=config, max_prompt_tokens=max_prompt_tokens, seed=seed)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, step: int, size: int) -> PromptBatch:
        """The prompts of a step, counted from 1: the next `size` of an endless series of shuffled passes."""
        places = np.arange((step - 1) * size, step * size)
        rows = [int(self._pass(place // len(self))[place % len(self)]) for place in places]
        return self._prompts(rows, np.random.default_rng((_LENGTH, self.seed, step)))

    def first(self, count: int) -> PromptBatch:
        """The first `count` rows, at lengths that do not depend on the run's seed: runs are compared on them."""
        return self._prompts(range(min(count, len(self))), np.random.default_rng(_EVAL_LENGTH))

    def _pass(self, number: int) -> np.ndarray:
        return np.random.default_rng((_ORDER, self.seed, number)).permutation(len(self))

    def _prompts(self, rows: Sequence[int], lengths: np.random.Generator) -> PromptBatch:
        chosen: dict[str, list[Any]] = self.rows[list(rows)]
        low, high = self.config.prompt_tokens or (self.max_prompt_tokens, self.max_prompt_tokens)
        limits = lengths.integers(low, high, size=len(rows), endpoint=True)
        texts = chosen.pop(self.config.text_field)
        encoded = self.tokens.encode(texts)
        return prompt_batch(
            [ids[: limit + len(self.tokens.prefix)] for ids, limit in zip(encoded, limits, strict=True)],
            self.tokens,
            chosen,
        )


def prompt_batch(
    ids: Sequence[Sequence[int]], tokens: Tokens, columns: dict[str, list[Any]] | None = None
) -> PromptBatch:
    """Rows of prompt ids as a batch; the text of a prompt is what its ids decode to."""
    queries, query_mask = tokens.pad_left(ids)
    return PromptBatch(
        queries=queries,
        query_mask=query_mask,
        index=torch.arange(len(ids)),
        texts=tuple(tokens.text(row) for row in ids),
        columns={name: tuple(column) for name, column in (columns or {}).items()},
    )


def _load_file(source: str) -> datasets.Dataset:
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"data.source={source}: no such file")
    if path.stat().st_size == 0:
        raise ConfigError(f"data.source={source}: the file is empty")
    try:
        rows = datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # the readers raise many kinds for a file that is not what its name says
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(f"data.source={source}: cannot be read as {path.suffix} ({reason})") from error
    return rows.filter(lambda row: row["text"].strip()) if path.suffix == ".txt" else rows


def _load_hub(source: str, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source, split=split)
    except ValueError as error:
        raise ConfigError(f"data.split={split}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # network, permission and format errors come in many kinds
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"data.source={source}: neither a .jsonl, .csv, .parquet or .txt file nor a data set that the hub or its "
            f"cache gave ({reason})"
        ) from error
