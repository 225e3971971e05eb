"""The texts of a reward model: laid out, encoded, and recorded in training, so that scoring forms them in the same way.

Knows tokenizers and the file of the record; knows no model and no rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from transformers.utils import cached_file

from rlhf_accel.data.conversations import Turns, answered
from rlhf_accel.data.tokenizer import special_ids_around
from rlhf_accel.system.errors import ConfigError, first_line

FILE = "reward_texts.json"
LARGEST_FILE = 16 << 20  # bytes of a record; four texts fit many times
PROBES, LONGEST_PROBE = 4, 8000  # training texts that are recorded with their scores, and characters of the longest
MARKED = 0.5  # if a larger share of the training texts has special tokens inside, they count as laid out

_STRICT = ConfigDict(extra="forbid")

Rounded = Literal["bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Probe:
    """A training text as laid out, its ids, and all its logits by the written model, in fp32."""

    text: str
    ids: list[int]
    scores: list[float]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Unmerged:
    """The base and the outputs of a model that is an adapter and a head (lora.merge=false)."""

    base: str
    """As in the training's config; a local folder by its absolute path."""
    weights: dict[Rounded, str]
    """A fingerprint of the base's weights rounded to each dtype."""
    labels: list[str]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Record:
    """How the texts of a reward model were formed in its training."""

    format: Literal["plain", "chat", "mixed", "marked"]
    """Texts as they are; conversations laid out by the chat template; both; or texts that already contain the special
    tokens of a template."""
    marker: str | None = None
    """For `marked`: a special token in the texts."""
    turns: Turns | None = None
    """For `chat`: a conversation of the training; `laid_out` is its text by the chat template."""
    laid_out: str | None = None
    max_tokens: int
    truncation_side: Literal["left", "right"]
    around: tuple[str, str]
    """Special tokens that the tokenizer puts before and after every text, such as BOS or [CLS], and an end token."""
    ends: tuple[str, str] | None = None
    """For `chat`: those of them that the chat template writes itself, and only these are read. Null if the tokenizer's
    own are read around each text, as by encoders and by models that an earlier version trained."""
    precision: Literal["fp32", "bf16"]
    """Precision of the training."""
    texts: int
    cut: int
    """Number of training texts; `cut` of them were longer than max_tokens."""
    probes: list[Probe]
    unmerged: Unmerged | None = None
    """For an adapter and a head; None for a whole model."""


def around(tokenizer: Any) -> tuple[str, str]:
    """The special tokens that the tokenizer puts before and after every text, as text."""
    before, after = special_ids_around(tokenizer)
    return "".join(tokenizer.convert_ids_to_tokens(before)), "".join(tokenizer.convert_ids_to_tokens(after))


def once(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The texts without the special tokens at their ends, which the tokenizer adds when it encodes them."""
    before, after = around(tokenizer)
    return [text.removeprefix(before).removesuffix(after) for text in texts]


def template_ends(tokenizer: Any) -> tuple[str, str] | None:
    """Which of the special tokens that the tokenizer puts around every text its chat template writes, as text.

    With these alone, a conversation becomes the ids of `apply_chat_template`. None for an encoder, which reads [CLS]
    whatever the template writes, and for a template that refuses two turns.
    """
    if tokenizer.cls_token is not None:
        return None
    before, after = around(tokenizer)
    try:
        text = str(tokenizer.apply_chat_template(answered("a", "b"), tokenize=False))
    except Exception:  # a template may raise anything
        return None
    return before if text.startswith(before) else "", after if text.endswith(after) else ""


def encode(
    tokenizer: Any, texts: Sequence[str], max_tokens: int, ends: tuple[str, str] | None = None
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """The model's inputs for each text, cut to `max_tokens` on the tokenizer's truncation side, and whether it was cut.

    The special tokens at both ends, which are never cut off, are those that the tokenizer adds, or `ends`. An empty
    text is read as a space: some tokenizers make no token of it.
    """
    if not texts:
        return [], []
    texts = [text or " " for text in once(tokenizer, texts)]
    if ends is not None:
        return _encoded_between(tokenizer, texts, max_tokens, ends)
    # Without the warning that a text is longer than the context: it is cut below.
    found = tokenizer(texts, verbose=False)
    cut = [len(ids) > max_tokens for ids in found["input_ids"]]
    if any(cut):
        found = tokenizer(texts, truncation=True, max_length=max_tokens)
    keys = [key for key in found if key != "attention_mask"]
    return [{key: list(found[key][i]) for key in keys} for i in range(len(texts))], cut


def _encoded_between(
    tokenizer: Any, texts: Sequence[str], max_tokens: int, ends: tuple[str, str]
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    # As one text: some tokenizers read the first word of a text in another way than a word behind a special token.
    found = tokenizer([ends[0] + text + ends[1] for text in texts], add_special_tokens=False, verbose=False)
    first, last = (len(tokenizer(end, add_special_tokens=False)["input_ids"]) if end else 0 for end in ends)
    rows, cut = [], [len(ids) > max_tokens for ids in found["input_ids"]]
    for i, is_cut in enumerate(cut):
        row = {key: list(found[key][i]) for key in found if key != "attention_mask"}
        if is_cut and tokenizer.truncation_side == "left":
            row = {key: ids[:first] + ids[len(ids) - max_tokens + first :] for key, ids in row.items()}
        elif is_cut:
            row = {key: ids[: max_tokens - last] + ids[len(ids) - last :] for key, ids in row.items()}
        rows.append(row)
    return rows, cut


def lay_out(tokenizer: Any, turns: Turns) -> str:
    """The conversation as one text by the chat template; raises `ValueError` if the template refuses these turns."""
    try:
        return once(tokenizer, [tokenizer.apply_chat_template(turns, tokenize=False)])[0]
    except Exception as error:  # a template may raise anything, for example about the order of roles
        raise ValueError(first_line(error)) from error


def special_token(tokenizer: Any, rows: Sequence[Sequence[int]]) -> str | None:
    """A special token inside the texts, if more than `MARKED` of them have one; their ends do not count."""
    added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    special = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    ends = tokenizer("")["input_ids"]  # BOS, EOS: added by the tokenizer, or written at the end of a text
    inside = [special.intersection(row) - set(ends) - {tokenizer.eos_token_id} for row in rows]
    held = [ids for ids in inside if ids]
    if len(held) <= MARKED * len(rows):
        return None
    return str(tokenizer.convert_ids_to_tokens(min(held[0])))


def spread(lengths: Sequence[int], usable: Sequence[bool], count: int = PROBES) -> list[int]:
    """Positions of up to `count` usable texts, from the shortest to the longest."""
    order = sorted((i for i, fits in enumerate(usable) if fits), key=lambda i: lengths[i])
    last = len(order) - 1
    return list(dict.fromkeys(order[round(last * i / max(count - 1, 1))] for i in range(count))) if order else []


def write(folder: Path, record: Record) -> None:
    """Write the record; raises `OSError` if the disk refuses it."""
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read(path: str, setting: str) -> Record | None:
    """The record of the model at `path`, a folder or a hub id; None if it has none, such as a model from elsewhere.

    Raises `ConfigError`, which begins with `setting` (`reward.model=PATH`), if the file is damaged.
    """
    file = _file(path)
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE >> 20} MiB")
        return TypeAdapter(Record).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f"{setting}: its {FILE}, which records how its texts were formed in training, is damaged ({reason}); train the "
        "model again, or remove the file and set reward.format",
        key="reward.model",
        reason=reason,
    )


def _file(path: str) -> Path | None:
    if Path(path).is_dir():
        file = Path(path) / FILE
        return file if file.exists() else None
    try:
        found = cached_file(path, FILE, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such model, or no hub: loading the model raises the error
        return None
    return None if found is None else Path(found)
