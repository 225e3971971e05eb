"""The only owner of the tokenizer: text to ids, padding, stop conditions, ids to text.

Sampled ids travel as ids: nothing here encodes a response again. Knows no model and no rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.data.loading import pretrained
from rlhf_accel.system.errors import ConfigError

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # where bytes are no character
_CONTEXT = 8  # shown tokens of a prompt that say how its response begins: a character has at most four


class Tokens:
    """A tokenizer with its special ids settled.

    `pad_id` only fills space, masks say what counts; a tokenizer without a PAD token fills with EOS. `prefix` is what
    it puts before every text (BOS, or all of `[gMASK] <sop>`). `added` are the tokens that are matched in a text as a
    whole, by their text; those in `hidden`, the special ones, are not shown in decoded texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(token_id for token_id in ids if token_id is not None)
        self.prefix: list[int] = _prefix(tokenizer)
        # Not all_special_tokens alone, which lacks those that no role such as EOS names (Llama 3's <|eot_id|>).
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        added = tokenizer.added_tokens_decoder
        self.added: dict[str, int] = {**dict(named), **{token.content: i for i, token in added.items()}}
        self.hidden = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @classmethod
    def load(cls, name_or_path: str, *, trust_remote_code: bool = False) -> Tokens:
        """Raises `ConfigError` when the model has no tokenizer."""
        try:
            tokenizer = pretrained(
                AutoTokenizer,
                name_or_path,
                trust_remote_code=trust_remote_code,
                said=f"model.name_or_path={name_or_path}",
            )
            # For some architectures (GPT-2) transformers makes an empty tokenizer where a folder holds none.
            if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
                raise ValueError("its vocabulary is empty")
        except ConfigError:
            raise
        except Exception as error:  # the libraries below raise many kinds for a missing or broken tokenizer
            raise ConfigError(
                f"model.name_or_path={name_or_path}: no tokenizer could be loaded; save one beside the model "
                f"({_first_line(error)})",
                key="model.name_or_path",
            ) from error
        return cls(tokenizer)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, after the tokenizer's usual prefix (such as BOS), which a text may bring itself."""
        if not texts:
            return []
        # Not verbose: a text may be longer than the model's context, as only its first tokens may be used.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._prefixed(ids) for ids in encoded]

    def _prefixed(self, ids: list[int]) -> list[int]:
        # What a chat template wrote begins with BOS, which is not to be read twice.
        own = next(n for n in range(len(self.prefix), -1, -1) if ids[:n] == self.prefix[len(self.prefix) - n :])
        return self.prefix + ids[own:]

    def pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "B Q"], Bool[Tensor, "B Q"]]:
        """Rows of ids as one int64 tensor with padding on the left, and its mask.

        Raises `ValueError` on an empty row: a prompt needs a token to continue from.
        """
        if any(len(row) == 0 for row in rows):
            raise ValueError(f"prompt {[len(row) for row in rows].index(0)} has no tokens")
        width = max((len(row) for row in rows), default=1)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
            mask[i, width - len(row) :] = True
        return ids, mask

    def decode(self, sequences: Sequences) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Text of the queries and of the responses, special tokens left out.

        Prompt + response is the decoded whole: a response keeps the leading space that a tokenizer would strip from it
        alone, and a character whose bytes lie on both sides of the border belongs to the response.
        """
        rows = zip(
            sequences.queries.tolist(),
            sequences.query_mask.tolist(),
            sequences.responses.tolist(),
            sequences.response_mask.tolist(),
            strict=True,
        )
        prompts, responses = [], []
        for query, query_mask, response, response_mask in rows:
            query = [token for token, counts in zip(query, query_mask, strict=True) if counts]
            response = [token for token, counts in zip(response, response_mask, strict=True) if counts]
            whole = self.text(query + response)
            border = _common_length(self.text(query), whole)
            prompts.append(whole[:border])
            responses.append(whole[border:])
        return tuple(prompts), tuple(responses)

    def stop_condition(self, stop: Sequence[str], extra_ids: Sequence[int] = ()) -> StopCondition:
        """When a response ends: at EOS, at one of `extra_ids`, at an added token that `stop` names, or once the text of
        the response holds one of the texts `stop`. Raises `ConfigError` for a text that no response can hold."""
        ids = {*extra_ids, *([] if self.eos_id is None else [self.eos_id])}
        ids |= {self.added[text] for text in stop if text in self.added}
        # A token that is not special is shown, and ends a response also where its text is spelled out.
        texts = tuple(text for text in stop if self.added.get(text) not in self.hidden)
        if "" in texts:
            raise ConfigError(
                "rollout.stop holds an empty text, which every response contains; remove it", key="rollout.stop"
            )
        hidden = [token for token, i in self.added.items() if i in self.hidden and token]
        for text in texts:
            if inside := [token for token in hidden if token in text]:
                raise ConfigError(
                    f"rollout.stop holds {text!r}, and texts of responses do not show the special token {inside[0]} "
                    "inside it; name the token alone",
                    key="rollout.stop",
                    token=inside[0],
                )
        return StopCondition(self, sorted(ids), texts)

    def save(self, folder: Path) -> None:
        """Raises `OSError` if the disk does not take it."""
        try:
            self.tokenizer.save_pretrained(folder)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(str(error)) from error  # tokenizers knows no other kind

    def text(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        shown = self.shown(ids)
        text = self._decoded(shown)
        # Where a character is cut off at the end, decoders with a fallback to bytes (Llama 2's) break all characters of
        # the run of bytes before it, too.
        for cut in range(1, 4):
            if not text.endswith(_BROKEN):
                break
            whole = self._decoded(shown[:-cut])
            if not whole.endswith(_BROKEN):
                return text if text.startswith(whole) else whole + _BROKEN
        return text

    def shown(self, ids: Sequence[int]) -> list[int]:
        """Those of the ids that are not special tokens."""
        return [i for i in ids if i not in self.hidden]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopCondition:
    """Says which responses their newest token ended: by a stop token, or by completing a stop text.

    `prompts` are the last shown tokens of each row's prompt, since some tokenizers write the first word of a response
    in another way where no prompt stands before it. A stop text lies in the response, and never begins in the prompt.
    """

    def __init__(
        self, tokens: Tokens, ids: Sequence[int], texts: Sequence[str], prompts: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.ids = tuple(ids)
        self.texts = tuple(texts)
        self._tokens = tokens
        self._prompts = prompts
        # A stop text that the newest token completes lies within the last tokens: each holds at least one byte. Before
        # it are the rest of a character, and a token that may be written in another way than within a text.
        self._window = 4 * max(map(len, texts), default=0) + 4

    def after(self, queries: Int[Tensor, "B Q"], query_mask: Bool[Tensor, "B Q"]) -> StopCondition:
        """The condition for responses to these prompts, row by row."""
        rows = [query[mask].tolist() for query, mask in zip(queries.cpu(), query_mask.cpu(), strict=True)]
        prompts = [self._tokens.shown(row)[-_CONTEXT:] for row in rows]
        return StopCondition(self._tokens, self.ids, self.texts, prompts)

    def __call__(self, responses: Int[Tensor, "B t"]) -> Bool[Tensor, " B"]:
        """`responses` are the tokens sampled so far, t >= 1; rows that ended earlier may say anything."""
        ended = torch.isin(responses[:, -1], torch.tensor(self.ids, device=responses.device))
        if self.texts:
            prompts = [[]] * len(responses) if self._prompts is None else self._prompts
            found = [
                self._completes(prompt, row if self._tokens.hidden.isdisjoint(row) else whole.tolist())
                for prompt, row, whole in zip(prompts, responses[:, -self._window :].tolist(), responses, strict=True)
            ]
            ended |= torch.tensor(found, device=responses.device)
        return ended

    def _completes(self, prompt: Sequence[int], response: list[int]) -> bool:
        if response[-1] in self._tokens.hidden:
            return False
        response = self._tokens.shown(response)[-self._window :]
        prompt = prompt if len(response) < self._window else []
        ids = [*prompt, *response]
        for start in range(4):  # tokens of a character that began before them
            now = self._tokens.text(ids[start:])
            if not now.startswith(_BROKEN):
                break
        if not any(text in now for text in self.texts):
            return False
        border = _common_length(self._tokens.text(ids[start : len(prompt)]), now) if start < len(prompt) else 0
        # The newest token must have written a part of the stop text: one that stood there before min_new_tokens does
        # not count again.
        before = _common_length(self._tokens.text(ids[start:-1]), now)
        return any(now.find(text, max(before - len(text) + 1, border)) >= 0 for text in self.texts)


def _prefix(tokenizer: Any) -> list[int]:
    """What stands before a text's own ids in the tokenizer's call; what it appends (T5's EOS) would end a prompt."""
    text = "a"
    whole, own = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if own and whole[i : i + len(own)] == own), [])


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
