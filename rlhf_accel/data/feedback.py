"""Human feedback on texts as typed rows: ratings, labels and pairs, from the hub, files or the embedded reviews.

Knows columns and their checks, the held-out rows, and conversations as text. Knows no model and no rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
from jaxtyping import Float, Int

from rlhf_accel.algorithm.calibration import PAIR_MARGIN
from rlhf_accel.config.reward_schema import RewardDataConfig
from rlhf_accel.data import prompts as data
from rlhf_accel.data import reward_texts
from rlhf_accel.data.conversations import Turns, is_conversation
from rlhf_accel.system.errors import ConfigError, key_in

# Pairs are drawn from ratings with a seed of their own: models of all seeds are compared on the same pairs. Each
# round puts every text into at most two pairs: more rounds for metrics, one for training, where each pair costs time.
_PAIRS_SEED, _TRAIN_ROUNDS, _HELD_ROUNDS = 6, 1, 10


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """N texts with a target each, or P pairs of texts; ratings for tuning and evaluation have both.

    `len()` and `select()` count targets if there are any, else pairs.
    """

    texts: tuple[str, ...]
    targets: np.ndarray | None = None
    """(N,) ratings in fp64, or classes in int64."""
    pairs: Int[np.ndarray, "P 2"]
    """Positions in `texts`: the preferred text, the other text."""
    margins: Float[np.ndarray, " P"]

    def __len__(self) -> int:
        return len(self.pairs) if self.targets is None else len(self.texts)

    def select(self, chosen: Sequence[int]) -> Feedback:
        """Only these rows, with the texts that they need."""
        rows = np.asarray(chosen, dtype=np.int64)
        if self.targets is not None:
            return of_targets([self.texts[i] for i in rows], self.targets[rows])
        used, pairs = np.unique(self.pairs[rows], return_inverse=True)
        texts = tuple(self.texts[i] for i in used)
        return Feedback(texts=texts, pairs=pairs.reshape(-1, 2), margins=self.margins[rows])


@dataclass(kw_only=True)
class Formed:
    """Counts texts and conversations in pairs; `first` is the first conversation with its text."""

    plain: int = 0
    conversations: int = 0
    first: tuple[Turns, str] | None = None

    def chat(self, turns: Turns, text: str) -> None:
        self.conversations += 1
        self.first = self.first or ([{"role": turn["role"], "content": turn["content"]} for turn in turns], text)


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Rows for training, for the choice of checkpoint and temperature, and for the metrics. No text of a pair is in two
    of them."""

    train: Feedback
    tuning: Feedback
    held: Feedback
    labels: tuple[str, ...]
    """Names of the model's outputs: the classes, or the name of the score."""
    sources: tuple[str, str, str]
    """Descriptions of the three sources."""
    formed: Formed
    """How many of the texts are conversations."""
    notes: tuple[str, ...] = ()
    """Messages for the user about rows that were left out."""


def of_targets(texts: Sequence[str], targets: np.ndarray) -> Feedback:
    """Feedback with targets and without pairs."""
    return Feedback(
        texts=tuple(texts), targets=targets, pairs=np.zeros((0, 2), dtype=np.int64), margins=np.zeros(0, dtype=float)
    )


def read(config: RewardDataConfig, tokenizer: Any, model_name: str, known_labels: Sequence[str]) -> Sets:
    """The sets that the config names. `tokenizer`, from `model_name`, lays out conversations.

    If the labels are those of the model, `known_labels`, they keep its order, so that its head stays usable.

    A file has no splits: a fixed tenth of its texts is held out, unless data.eval_split names another file, and half of
    the held-out texts is for tuning, unless data.tuning_split names one.

    Raises `ConfigError` for data that cannot be read or used, naming the key and the first row at fault.
    """
    return _Reader(config, tokenizer, model_name, known_labels).sets()


def draw_pairs(texts: Sequence[str], ratings: Float[np.ndarray, " N"], rounds: int) -> Int[np.ndarray, "P 2"]:
    """Pairs of different texts rated more than `PAIR_MARGIN` apart, the better text first; always the same pairs.

    A round arranges the texts in a random circle and pairs neighbours, so each text is in at most two of its pairs.
    """
    rng = np.random.default_rng(_PAIRS_SEED)
    found: dict[tuple[int, int], None] = {}
    for _ in range(rounds):
        order = rng.permutation(len(texts))
        for a, b in zip(order.tolist(), np.roll(order, 1).tolist(), strict=True):
            better, worse = (a, b) if ratings[a] > ratings[b] else (b, a)
            if ratings[better] - ratings[worse] > PAIR_MARGIN and texts[a] != texts[b]:
                found[better, worse] = None
    return np.array(list(found), dtype=np.int64).reshape(-1, 2)


def origins(feedback: Feedback) -> list[str]:
    """For each row one text that identifies its group: rows that share a text, directly or through other rows, which
    must stay in one set. It is the first text of the group in alphabetical order."""
    if feedback.targets is not None:
        return list(feedback.texts)
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while (above := parent.setdefault(text, text)) != text:
            parent[text] = parent[above]
            text = above
        return text

    for a, b in feedback.pairs:
        first, second = sorted((root(feedback.texts[a]), root(feedback.texts[b])))
        parent[second] = first
    return [root(feedback.texts[a]) for a, _ in feedback.pairs]


@dataclass(frozen=True)
class _Reader:
    config: RewardDataConfig
    tokenizer: Any
    model_name: str
    known_labels: Sequence[str]
    formed: Formed = field(default_factory=Formed)

    def sets(self) -> Sets:
        config = self.config
        embedded = config.source.startswith("embedded:")
        rows = data.load_rows(config.source, config.split, config.max_samples)
        labels: tuple[str, ...] = (config.target_field if config.objective == "ratings" else "score",)
        if config.objective == "labels":
            labels = ("negative", "positive") if embedded else self._label_names(rows)
            labels = tuple(self.known_labels) if set(self.known_labels) == set(labels) else labels
        parse: dict[str, Callable[[datasets.Dataset, str], Feedback]] = {
            "ratings": self._ratings,
            "labels": (lambda rows, source: self._signs(rows, source, labels))
            if embedded
            else lambda rows, source: self._labels(rows, source, labels),
            "pairs": self._ratings if embedded else self._pairs,
        }
        take = parse[config.objective]
        train = take(rows, config.source)
        is_file = data.is_file_name(config.source)
        train_source = f"`{config.source}`" if is_file else f"the split `{config.split}` of `{config.source}`"
        if is_file and not data.is_file_name(config.eval_split):
            train, held = self._tenth(train)
            train_source, held_source = f"{train_source} but for a tenth", f"a tenth of `{config.source}`, kept back"
        else:
            held, held_source = take(*self._rows(config.eval_split, "data.eval_split")), f"`{config.eval_split}`"
        if config.tuning_split is None or (is_file and not data.is_file_name(config.tuning_split)):
            tuning, held = _halves(held)
            tuning_source, held_source = f"one half of {held_source}", f"the other half of {held_source}"
        else:
            tuning, tuning_source = (
                take(*self._rows(config.tuning_split, "data.tuning_split")),
                f"`{config.tuning_split}`",
            )
        notes = []
        if config.objective == "ratings":
            tuning, held = _with_pairs(tuning, _HELD_ROUNDS), _with_pairs(held, _HELD_ROUNDS)
        elif config.objective == "pairs" and embedded:
            sets = [(train, _TRAIN_ROUNDS), (tuning, _HELD_ROUNDS), (held, _HELD_ROUNDS)]
            train, tuning, held = (replace(_with_pairs(part, rounds), targets=None) for part, rounds in sets)
        elif config.objective == "pairs":
            before = len(train) + len(tuning)
            train, tuning = _without(train, (*tuning.texts, *held.texts)), _without(tuning, held.texts)
            if left_out := before - len(train) - len(tuning):
                notes.append(f"{left_out} pairs are left out, because one of their texts is in the held-out pairs")
        if not len(train) or not len(held):
            named = f"data.source={config.source}" if len(held) else f"data.eval_split={config.eval_split}"
            raise ConfigError(f"{named}: no rows are left for training or for the metrics; add rows", key=key_in(named))
        sources = (train_source, tuning_source, held_source)
        return Sets(
            train=train,
            tuning=tuning,
            held=held,
            labels=labels,
            sources=sources,
            formed=self.formed,
            notes=tuple(notes),
        )

    def _rows(self, split: str, key: str) -> tuple[datasets.Dataset, str]:
        limit = self.config.max_samples
        if data.is_file_name(split):
            return data.load_rows(split, "train", limit, source_key=key), split
        return data.load_rows(self.config.source, split, limit, split_key=key), self.config.source

    def _tenth(self, feedback: Feedback) -> tuple[Feedback, Feedback]:
        is_held = [data.held_out(text) for text in origins(feedback)]
        if all(is_held) or not any(is_held):
            raise ConfigError(
                f"data.source={self.config.source}: its {len(feedback)} rows are too few to hold out a tenth, "
                "or share their texts; add rows, or name another file in data.eval_split",
                key="data.source",
            )
        train = [i for i, held in enumerate(is_held) if not held]
        return feedback.select(train), feedback.select([i for i, held in enumerate(is_held) if held])

    def _ratings(self, rows: datasets.Dataset, source: str) -> Feedback:
        texts = data.checked_texts(rows, source, self.config.text_field)
        ratings = self._numbers(rows, source, "target_field", self.config.target_field)
        return of_targets(texts, np.array(ratings, dtype=np.float64))

    def _signs(self, rows: datasets.Dataset, source: str, names: Sequence[str]) -> Feedback:
        rated = self._ratings(rows, source)
        assert rated.targets is not None
        # A mean rating of exactly 0 is neither positive nor negative.
        signed = rated.select(np.flatnonzero(rated.targets).tolist())
        assert signed.targets is not None
        positive = signed.targets > 0
        return replace(signed, targets=np.where(positive, names.index("positive"), names.index("negative")))

    def _label_names(self, rows: datasets.Dataset) -> tuple[str, ...]:
        """The labels in the order of the data set if it has one, else sorted, numbers by size."""
        given = set(self._label_column(rows, self.config.source))
        feature = rows.features[self.config.target_field]
        if len(given) < 2:  # for example if data.max_samples cuts a data set that is sorted by label
            raise ConfigError(
                f"data.target_field={self.config.target_field}: all {len(rows)} rows read of {self.config.source} have "
                f"the label {given.pop()}; expected two labels or more",
                key="data.target_field",
            )
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        numbers = all(name.lstrip("-").isdigit() for name in given)
        return tuple(sorted(given, key=int if numbers else str))

    def _labels(self, rows: datasets.Dataset, source: str, names: Sequence[str]) -> Feedback:
        texts = data.checked_texts(rows, source, self.config.text_field)
        places = {name: i for i, name in enumerate(names)}
        classes = []
        for number, label in enumerate(self._label_column(rows, source), start=1):
            if label not in places:
                raise ConfigError(
                    f"data.target_field={self.config.target_field}: row {number} of {source} has the label {label}, "
                    f"which is not in the training data; it has {', '.join(names)}",
                    key="data.target_field",
                )
            classes.append(places[label])
        return of_targets(texts, np.array(classes, dtype=np.int64))

    def _label_column(self, rows: datasets.Dataset, source: str) -> list[str]:
        field = self.config.target_field
        _check_column(rows, source, "target_field", field)
        feature, names = rows.features[field], []
        for number, value in enumerate(rows[field], start=1):
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(feature, datasets.ClassLabel) and isinstance(value, int) and value >= 0:
                value = feature.names[value]
            elif isinstance(feature, datasets.ClassLabel):
                value = None  # such as -1 for rows without a label
            if not isinstance(value, (str, int)) or value == "":
                raise ConfigError(
                    f"data.target_field={field}: row {number} of {source} holds {value!r:.40}, expected a label (a "
                    "text or a whole number)",
                    key="data.target_field",
                )
            names.append(str(value))
        return names

    def _pairs(self, rows: datasets.Dataset, source: str) -> Feedback:
        config = self.config
        first, second = (self._contents(rows, source, field) for field in config.pair_fields)
        swapped = self._choices(rows, source)
        margins = [0.0] * len(rows)
        if config.margin_field is not None:
            margins = self._numbers(rows, source, "margin_field", config.margin_field, at_least=0.0)
        places: dict[str, int] = {}
        pairs = []
        for number, (a, b, swap) in enumerate(zip(first, second, swapped, strict=True), start=1):
            if a == b:
                raise ConfigError(
                    f"data.pair_fields={list(config.pair_fields)}: row {number} of {source} has the same text twice; "
                    "remove the row",
                    key="data.pair_fields",
                )
            pair = (places.setdefault(a, len(places)), places.setdefault(b, len(places)))
            pairs.append(pair[::-1] if swap else pair)
        return Feedback(texts=tuple(places), pairs=np.array(pairs, dtype=np.int64), margins=np.array(margins))

    def _choices(self, rows: datasets.Dataset, source: str) -> list[bool]:
        """For each row, whether the second text is preferred."""
        field = self.config.choice_field
        if field is None:
            return [False] * len(rows)
        _check_column(rows, source, "choice_field", field)
        first, second = self.config.pair_fields
        meaning = {"0": False, "1": True, first: False, second: True}
        swapped = []
        for number, value in enumerate(rows[field], start=1):
            if isinstance(value, bool) or str(value) not in meaning:
                raise ConfigError(
                    f"data.choice_field={field}: row {number} of {source} holds {value!r:.40}, expected 0, 1, "
                    f"{first} or {second}; correct or remove the row",
                    key="data.choice_field",
                )
            swapped.append(meaning[str(value)])
        return swapped

    def _contents(self, rows: datasets.Dataset, source: str, field: str) -> list[str]:
        _check_column(rows, source, "pair_fields", field)
        texts = []
        for number, content in enumerate(rows[field], start=1):
            place = f"data.pair_fields: row {number} of {source} in the column {field}"
            if is_conversation(content):
                texts.append(self._laid_out(content, place))
                self.formed.chat(content, texts[-1])
            elif isinstance(content, str) and content.strip():
                texts.append(content)
                self.formed.plain += 1
            else:
                raise ConfigError(
                    f"{place} has neither a text nor a conversation, a list of {{role, content}} (found "
                    f"{content!r:.40}); remove the row",
                    key=key_in(place),
                )
        return texts

    def _laid_out(self, conversation: Turns, place: str) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{place} is a conversation, and the tokenizer of model.name_or_path={self.model_name} has no chat "
                "template; use a model that has one, or write the conversations as texts",
                key="model.name_or_path",
            )
        try:
            return reward_texts.lay_out(self.tokenizer, conversation)
        except ValueError as error:
            raise ConfigError(
                f"{place} does not fit the chat template of {self.model_name} ({error})", key="data.pair_fields"
            ) from error

    def _numbers(
        self, rows: datasets.Dataset, source: str, key: str, field: str, at_least: float = -math.inf
    ) -> list[float]:
        _check_column(rows, source, key, field)
        numbers = [_number(value) for value in rows[field]]
        bound = "" if at_least == -math.inf else f" of {at_least:g} or more"
        for number, value in enumerate(numbers, start=1):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < at_least:
                raise ConfigError(
                    f"data.{key}={field}: row {number} of {source} holds {value!r:.40}, expected a finite number"
                    f"{bound}",
                    key=f"data.{key}",
                )
        return [float(value) for value in numbers]


def _number(value: Any) -> Any:
    """The number that a text spells, else the value as it is: a CSV column with 0.50 is read as texts."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_column(rows: datasets.Dataset, source: str, key: str, field: str) -> None:
    if field not in rows.column_names:
        raise ConfigError(
            f"data.{key}={field} is not a column of {source}; it has {', '.join(rows.column_names)}", key=f"data.{key}"
        )


def _halves(feedback: Feedback) -> tuple[Feedback, Feedback]:
    """Two halves of the rows, by every second group in the order of hashes; the second may have one group more."""
    of_row = origins(feedback)
    order = sorted(set(of_row), key=lambda text: hashlib.sha256(text.encode()).digest())
    first = set(order[1::2])
    inside = [i for i, text in enumerate(of_row) if text in first]
    return feedback.select(inside), feedback.select([i for i, text in enumerate(of_row) if text not in first])


def _with_pairs(feedback: Feedback, rounds: int) -> Feedback:
    assert feedback.targets is not None
    pairs = draw_pairs(feedback.texts, feedback.targets, rounds)
    return replace(feedback, pairs=pairs, margins=np.zeros(len(pairs)))


def _without(feedback: Feedback, texts: Iterable[str]) -> Feedback:
    """The pairs without any of these texts."""
    taken = set(texts)
    is_free = [text not in taken for text in feedback.texts]
    return feedback.select([i for i, (a, b) in enumerate(feedback.pairs) if is_free[a] and is_free[b]])
