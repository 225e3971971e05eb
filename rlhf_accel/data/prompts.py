"""Prompts from the hub, local files or the embedded data, as typed batches in an order that the seed fixes.

The batch of a step depends on (seed, step) only, so a resumed run needs no saved position, and every process builds the
same batch. Knows no model and no rank.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from rlhf_accel.algorithm.batches import PromptBatch
from rlhf_accel.config.schema import DataConfig
from rlhf_accel.data import embedded
from rlhf_accel.data.conversations import (
    MESSAGES,
    Turns,
    identity,
    is_conversation,
    is_text,
    transcript,
    turns_of,
    with_system,
)
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
        if not is_text(text):
            fix = "remove the row or choose another data.text_field"
            if is_conversation(text):
                fix = "it is a conversation: set data.chat=true to format it by the policy's chat template"
            raise ConfigError(
                f"data.text_field={text_field}: row {number} of {source} has no text there (found {text!r:.40}); {fix}",
                key="data.text_field",
                row=number,
            )
    return texts


def checked_prompts(rows: Table, source: str, config: DataConfig) -> list[str]:
    """A text for each row that tells its prompt apart; raises `ConfigError` as `checked_texts`, and with data.chat for
    the first row without a conversation."""
    column = text_column(rows, config.text_field)
    if not config.chat:
        return checked_texts(rows, source, column)
    if column not in rows.column_names:
        return checked_texts(rows, source, column)  # raises
    return [identity(turns) for turns in _conversations(rows[column], source, column)]


def text_column(rows: Table, text_field: str) -> str:
    """data.text_field, or `prompt`, as TRL calls it, if there is no column `text`."""
    names = rows.column_names
    return "prompt" if text_field == "text" and "text" not in names and "prompt" in names else text_field


def _conversations(values: Sequence[Any], source: str, column: str) -> list[Turns]:
    """The turns in each cell; raises `ConfigError` for the first one without any to respond to."""
    conversations = []
    for number, value in enumerate(values, start=1):
        turns = turns_of(value)
        if turns is None:
            raise ConfigError(
                f"data.text_field={column}: row {number} of {source} has neither a text nor a conversation there, a "
                f"list of {{role, content}} that ends with a turn to respond to (found {value!r:.40}); correct or "
                "remove the row",
                key="data.text_field",
                row=number,
            )
        conversations.append(turns)
    return conversations


def _check_column_names(rows: Table, source: str, source_key: str, config: DataConfig) -> None:
    arguments = (*_ARGUMENTS, MESSAGES) if config.chat else _ARGUMENTS
    column = text_column(rows, config.text_field)
    taken = [name for name in rows.column_names if name in arguments and name != column]
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
    texts = checked_prompts(rows, config.source, config)
    _check_column_names(rows, config.source, "data.source", config)
    if config.eval_split is not None:
        return rows, _eval_rows(config, config.eval_split)
    train = [i for i, text in enumerate(texts) if not held_out(text)]
    held_rows = [i for i, text in enumerate(texts) if held_out(text)]
    return (rows.select(train), rows.select(held_rows)) if train else (rows, rows.select([]))


def _eval_rows(config: DataConfig, eval_split: str) -> Table:
    if is_file_name(eval_split):
        held = load_rows(eval_split, "train", source_key="data.eval_split")
        checked_prompts(held, eval_split, config)
        _check_column_names(held, eval_split, "data.eval_split", config)
        return held
    if is_file_name(config.source):
        raise ConfigError(
            f"data.eval_split={eval_split}: data.source={config.source} is a file, which has no splits; name another "
            "file, or set data.eval_split=null to hold out a tenth of this one",
            key="data.eval_split",
        )
    held = load_rows(config.source, eval_split, split_key="data.eval_split")
    checked_prompts(held, config.source, config)
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

        Raises `ConfigError` if none is left, if the tokenizer makes no token of a text, or if the chat template refuses
        a conversation.
        """
        config = replace(config, text_field=text_column(rows, config.text_field))
        if config.prompt_tokens is None:
            checked_prompts(rows, config.source, config)
            encoded = _encoded(rows[config.text_field], tokens, config)
            lengths = [len(ids) - (0 if config.chat else len(tokens.prefix)) for ids in encoded]
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

    def some_texts(self, count: int) -> list[Any]:
        """Whole texts, or conversations, of `count` rows drawn at random, or of all rows if there are fewer."""
        order = np.random.default_rng(_FIXED_ORDER).permutation(len(self))[:count]
        return list(self.rows[order.tolist()][self.config.text_field])

    def _pass(self, number: int) -> np.ndarray:
        return np.random.default_rng((_ORDER, self.seed, number)).permutation(len(self))

    def _prompts(self, rows: Sequence[int], lengths: np.random.Generator) -> PromptBatch:
        chosen: dict[str, list[Any]] = self.rows[list(rows)]
        low, high = self.config.prompt_tokens or (self.max_prompt_tokens, self.max_prompt_tokens)
        limits = lengths.integers(low, high, size=len(rows), endpoint=True)
        texts = chosen.pop(self.config.text_field)
        if self.config.chat:  # never cut: those that are too long were left out
            return chat_batch(_with_run_system(texts, self.config), self.tokens, self.config, chosen)
        encoded = _encoded(texts, self.tokens, self.config)
        return prompt_batch(
            [ids[: limit + len(self.tokens.prefix)] for ids, limit in zip(encoded, limits, strict=True)],
            self.tokens,
            chosen,
        )


def _with_run_system(values: Sequence[Any], config: DataConfig) -> list[Turns]:
    turns = _conversations(values, config.source, config.text_field)
    return [with_system(each, config.system) for each in turns]


def _encoded(texts: Sequence[Any], tokens: Tokens, config: DataConfig) -> list[list[int]]:
    """The ids of each text or conversation; raises `ConfigError` for the first one without any."""
    if config.chat:
        return encode_conversations(_with_run_system(texts, config), tokens, config)
    encoded = tokens.encode(texts)
    if [] in encoded:
        raise ConfigError(
            f"data.text_field={config.text_field}: the tokenizer makes no token of the text "
            f"{texts[encoded.index([])]!r:.40} of {config.source}; remove the row",
            key="data.text_field",
        )
    return encoded


def encode_conversations(conversations: Sequence[Turns], tokens: Tokens, config: DataConfig) -> list[list[int]]:
    """Ids of conversations by the chat template; raises `ConfigError` for the first one that does not fit it, and if it
    leaves out a system turn."""
    texts, key = [], "data.text_field" if config.system is None else "data.system"
    for turns in conversations:
        system = turns[0]["content"].strip() if turns[0]["role"] == "system" else ""
        try:
            texts.append(tokens.lay_out(turns))
            if system not in texts[-1]:
                raise ValueError("it leaves out the system turn")
        except ValueError as error:
            fix = "; write its instructions into the user's turn" if system else ""
            raise ConfigError(
                f"{key}: the conversation {transcript(turns)!r:.60} does not fit the policy's chat template "
                f"({error}){fix}",
                key=key,
            ) from error
    return tokens.encode_laid_out(texts)


def chat_batch(
    conversations: Sequence[Turns], tokens: Tokens, config: DataConfig, columns: dict[str, list[Any]] | None = None
) -> PromptBatch:
    """Conversations as a batch, with their transcripts as texts; rewards get them in the column `messages`."""
    ids = encode_conversations(conversations, tokens, config)
    batch = prompt_batch(ids, tokens, {**(columns or {}), MESSAGES: list(conversations)})
    texts = tuple(map(transcript, conversations))
    return replace(batch, texts=texts, transcripts=texts)


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


def own_prompts(texts: Sequence[Any], tokens: Tokens, config: DataConfig | None = None) -> PromptBatch:
    """Whole prompts from a caller: texts, or with data.chat texts and conversations.

    Raises `ConfigError` if there are none, or for the first one without a text.
    """
    if isinstance(texts, str):
        raise ConfigError(f"expected a list of prompts, and found one text: {texts!r:.40}; put it into a list")
    texts = list(texts)
    if not texts:
        raise ConfigError("there are no prompts; give at least one")
    if config is not None and config.chat:
        turns = [turns_of(text) for text in texts]
        found = [with_system(each, config.system) for each in turns if each is not None]
        if len(found) == len(texts):
            return chat_batch(found, tokens, config)
        encoded: list[Any] = [[] if each is None else each for each in turns]
    else:
        encoded = [tokens.encode([text])[0] if is_text(text) else [] for text in texts]
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
