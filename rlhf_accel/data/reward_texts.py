"""How a reward model's texts are formed: laid out, encoded, and recorded beside the model when it is trained, so that
scoring forms them in the same way. Knows tokenizers and the record's file; knows no model and no rank.
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

from rlhf_accel.system.errors import ConfigError

FILE = "reward_texts.json"
LARGEST_FILE = 16 << 20  # bytes of such a file; four texts fit many times
PROBES, LONGEST_PROBE = 4, 8000  # training texts that are kept with their scores, and characters of the longest
MARKED = 0.5  # share of the training texts with special tokens inside, above which the texts are taken for laid out

_STRICT = ConfigDict(extra="forbid")

Turns = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Probe:
    """A training text as laid out, what it was encoded to, and all logits of the written model for it, in fp32."""

    text: str
    ids: list[int]
    scores: list[float]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Record:
    """How the texts of a reward model were formed in its training."""

    format: Literal["plain", "chat", "mixed", "marked"]
    """Texts as they are; conversations by the tokenizer's chat template; some of each; or texts that already hold
    special tokens, as somebody's template wrote them."""
    marker: str | None = None
    """Of `marked`: a special token that they hold."""
    turns: Turns | None = None
    """Of `chat`: a conversation of the training, and in `laid_out` the text that its template made of it."""
    laid_out: str | None = None
    max_tokens: int
    truncation_side: Literal["left", "right"]
    around: tuple[str, str]
    """What the tokenizer put before and after every text: BOS or [CLS], an end token."""
    precision: Literal["fp32", "bf16"]
    """What the training computed in."""
    texts: int
    cut: int
    """Texts to learn from, and how many of them were longer than max_tokens."""
    probes: list[Probe]


def around(tokenizer: Any) -> tuple[str, str]:
    """The special tokens that the tokenizer itself puts before and after a text, as text."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            before, after = whole[:start], whole[start + len(bare) :]
            return "".join(tokenizer.convert_ids_to_tokens(before)), "".join(tokenizer.convert_ids_to_tokens(after))
    return "", ""


def once(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The texts without the special tokens at either end that the tokenizer will put there itself."""
    before, after = around(tokenizer)
    return [text.removeprefix(before).removesuffix(after) for text in texts]


def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """For each text what the model reads, cut to `max_tokens` on the tokenizer's truncation side, and whether it was.

    An empty text, of which some tokenizers make no token at all, is read as a space.
    """
    if not texts:
        return [], []
    texts = [text or " " for text in once(tokenizer, texts)]
    # Not verbose: a text may be longer than the model's context, as it is cut.
    found = tokenizer(texts, verbose=False)
    cut = [len(ids) > max_tokens for ids in found["input_ids"]]
    if any(cut):
        found = tokenizer(texts, truncation=True, max_length=max_tokens)
    keys = [key for key in found if key != "attention_mask"]
    return [{key: list(found[key][i]) for key in keys} for i in range(len(texts))], cut


def lay_out(tokenizer: Any, turns: Turns) -> str:
    """The conversation as one text, by the tokenizer's chat template; raises `ValueError` if it refuses these turns."""
    try:
        return once(tokenizer, [tokenizer.apply_chat_template(turns, tokenize=False)])[0]
    except Exception as error:  # a template may refuse in any way, such as roles in another order
        raise ValueError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def is_conversation(content: Any) -> bool:
    """Whether it is a list of {role, content}, both texts, and not empty."""
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in content
        )
    )


def answered(prompt: str | Turns, response: str) -> Turns:
    """A conversation that ends with the response; of a prompt that is one itself, an answer at its end is left out.

    >>> answered("Hi", "Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return [*turns, {"role": "assistant", "content": response}]


def special_token(tokenizer: Any, rows: Sequence[Sequence[int]]) -> str | None:
    """The special token that is inside of texts, where more than `MARKED` of them hold one; the ends do not count."""
    added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    special = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    ends = tokenizer("")["input_ids"]  # BOS, EOS: of ours, or at the end of a text that says where it ends
    inside = [special.intersection(row) - set(ends) - {tokenizer.eos_token_id} for row in rows]
    held = [ids for ids in inside if ids]
    if len(held) <= MARKED * len(rows):
        return None
    return str(tokenizer.convert_ids_to_tokens(min(held[0])))


def spread(lengths: Sequence[int], usable: Sequence[bool], count: int = PROBES) -> list[int]:
    """Places of `count` usable texts of different lengths, from the shortest to the longest."""
    order = sorted((i for i, fits in enumerate(usable) if fits), key=lambda i: lengths[i])
    last = len(order) - 1
    return list(dict.fromkeys(order[round(last * i / max(count - 1, 1))] for i in range(count))) if order else []


def write(folder: Path, record: Record) -> None:
    """Raises `OSError` if the disk refuses it."""
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read(path: str, said: str) -> Record | None:
    """The record of the model at `path`, a folder or a hub id; None where it has none, as models from elsewhere.

    Raises `ConfigError`, which begins with `said`, for a file that is not one.
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
        f"{said}: its {FILE}, which records how its texts were formed in training, is damaged ({reason}); train the "
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
    except (OSError, ValueError):  # no such model, or no hub: whoever loads the model says so
        return None
    return None if found is None else Path(found)
