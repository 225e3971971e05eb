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

from rlhf_accel.config import ConfigError
from rlhf_accel.loading import pretrained
from rlhf_accel.types import Sequences


class Tokens:
    """A tokenizer with its special ids settled.

    `pad_id` only fills space, masks say what counts; a tokenizer without a PAD token fills with EOS.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(token_id for token_id in ids if token_id is not None)
        # What the tokenizer puts before a text (Llama's BOS). What it appends (T5's EOS) would end every prompt.
        around = tokenizer("")["input_ids"]
        self.prefix: list[int] = around[:1] if around[:1] == [tokenizer.bos_token_id] else []

    @classmethod
    def load(cls, name_or_path: str, *, trust_remote_code: bool = False) -> Tokens:
        """Raises `ConfigError` when the model has no tokenizer."""
        try:
            tokenizer = pretrained(AutoTokenizer, name_or_path, trust_remote_code=trust_remote_code)
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
        """Ids of each text, after the tokenizer's usual prefix (such as BOS)."""
        if not texts:
            return []
        # Not verbose: a text may be longer than the model's context, as only its first tokens may be used.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self.prefix + ids for ids in encoded]

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
        """When a response ends: at EOS, at one of `extra_ids`, or once its text holds one of the texts `stop`."""
        special = set(self.tokenizer.all_special_tokens)
        ids = {*extra_ids, *([] if self.eos_id is None else [self.eos_id])}
        ids |= {self.tokenizer.convert_tokens_to_ids(text) for text in stop if text in special}
        if any(not text for text in stop):
            raise ConfigError(
                "rollout.stop holds an empty text, which every response contains; remove it", key="rollout.stop"
            )
        return StopCondition(self, sorted(ids), tuple(text for text in stop if text not in special))

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
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopCondition:
    """Says which responses their newest token ended: by a stop token, or by completing a stop text."""

    def __init__(self, tokens: Tokens, ids: Sequence[int], texts: Sequence[str]) -> None:
        self.ids = tuple(ids)
        self.texts = tuple(texts)
        self._tokens = tokens

    def __call__(self, responses: Int[Tensor, "B t"]) -> Bool[Tensor, " B"]:
        """`responses` are the tokens sampled so far, t >= 1; rows that ended earlier may say anything."""
        ended = torch.isin(responses[:, -1], torch.tensor(self.ids, device=responses.device))
        if self.texts:
            # A stop text that the newest token completes lies within the last tokens: each holds at least one byte.
            window = 4 * max(len(text) for text in self.texts) + 1
            found = [self._completes(row) for row in responses[:, -window:].tolist()]
            ended |= torch.tensor(found, device=responses.device)
        return ended

    def _completes(self, ids: list[int]) -> bool:
        # The newest token must have written a part of the stop text: one that stood there before min_new_tokens does
        # not count again.
        now = self._tokens.text(ids)
        before = _common_length(self._tokens.text(ids[:-1]), now)
        return any(now.rfind(text) + len(text) > before for text in self.texts if text in now)


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
