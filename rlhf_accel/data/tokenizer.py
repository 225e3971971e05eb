"""The only owner of the policy's tokenizer: text to ids, padding, stop conditions, ids to text.

Sampled ids stay ids: no response is encoded again. Knows no model and no rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.config.places import template_text
from rlhf_accel.config.schema import DataConfig
from rlhf_accel.data.conversations import Turns
from rlhf_accel.data.loading import pretrained
from rlhf_accel.system.errors import ConfigError, as_config_error, first_line
from rlhf_accel.system.transfer import to_device

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # in place of bytes that are not a character
_CONTEXT = 8  # shown tokens of a prompt that decide how its response begins: a character has at most four


class Tokens:
    """A tokenizer with its special ids.

    `pad_id` fills padding, which masks exclude; without a PAD token it is EOS. `prefix` holds the ids that
    the tokenizer puts before every text (BOS, or `[gMASK] <sop>`). `added` maps the text of each token that is matched
    as a whole to its id. `hidden` holds the ids of special tokens, which decoded texts omit. `template_options` are
    passed to the chat template.
    """

    def __init__(self, tokenizer: Any, template_options: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template_options = template_options or {}
        self.eos_id: int | None = tokenizer.eos_token_id
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(token_id for token_id in ids if token_id is not None)
        self.prefix: list[int] = special_ids_around(tokenizer)[0]  # a suffix, such as T5's EOS, would end the prompt
        # all_special_tokens lacks special tokens without a role such as EOS, for example <|eot_id|> of Llama 3.
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        added = tokenizer.added_tokens_decoder
        self.added: dict[str, int] = {**dict(named), **{token.content: i for i, token in added.items()}}
        self.hidden = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    @classmethod
    def load(cls, name_or_path: str, *, trust_remote_code: bool = False, data: DataConfig | None = None) -> Tokens:
        """The tokenizer of a folder or hub id, with the chat template that `data` asks for, if any.

        Raises `ConfigError` if there is no tokenizer, or no chat template where one is needed.
        """
        named = f"model.name_or_path={name_or_path}"
        here = "" if os.path.exists(name_or_path) else "there is no such folder of a run or a model here, and "
        message = f"{named}: {here}no tokenizer could be loaded; save one beside the model"
        with as_config_error(message, key="model.name_or_path"):
            tokenizer = pretrained(AutoTokenizer, name_or_path, trust_remote_code=trust_remote_code, subject=named)
            # For some architectures (GPT-2) transformers makes an empty tokenizer where a folder holds none.
            if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
                raise ValueError("its vocabulary is empty")
        return cls(tokenizer, _with_template(tokenizer, name_or_path, data) if data is not None and data.chat else None)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the tokenizer's prefix (such as BOS) once, even if the text begins with it."""
        if not texts:
            return []
        # Not verbose: a text may be longer than the model's context, as only its first tokens may be used.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._prefixed(ids) for ids in encoded]

    def lay_out(self, turns: Turns) -> str:
        """The conversation by the chat template, up to where the response begins.

        Raises `ValueError` if the template refuses these turns.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True, **self.template_options
                )
            )
        except Exception as error:  # a template may raise anything, for example about the order of roles
            raise ValueError(first_line(error)) from error

    def encode_laid_out(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts by the chat template, whose special tokens are the only ones."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def _prefixed(self, ids: list[int]) -> list[int]:
        # A text from a chat template begins with BOS, which must not be read twice.
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
        """Texts of the queries and of the responses, without special tokens.

        Prompt + response is the decoded sequence: the response keeps the leading space that some tokenizers strip from
        a text alone, and a character with bytes on both sides of the border belongs to the response.
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
        """The end of a response: EOS, one of `extra_ids`, an added token named in `stop`, or a text of `stop`.

        Raises `ConfigError` for a text that no response can contain.
        """
        ids = {*extra_ids, *([] if self.eos_id is None else [self.eos_id])}
        ids |= {self.added[text] for text in stop if text in self.added}
        # A token that is not special is shown, so its text ends a response even if other tokens spell it.
        texts = tuple(text for text in stop if self.added.get(text) not in self.hidden)
        hidden = [token for token, i in self.added.items() if i in self.hidden and token]
        for text in texts:
            if inside := [token for token in hidden if token in text]:
                raise ConfigError(
                    f"rollout.stop contains {text!r} with the special token {inside[0]}, which the texts of responses "
                    "omit; name the token alone",
                    key="rollout.stop",
                    token=inside[0],
                )
        return StopCondition(self, sorted(ids), texts)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files; raises `OSError` if the disk refuses them."""
        try:
            self.tokenizer.save_pretrained(folder)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(str(error)) from error  # tokenizers raises a plain Exception

    def text(self, ids: Sequence[int]) -> str:
        """The text of these ids, without special tokens."""
        shown = self.shown(ids)
        text = self._decoded(shown)
        # If the last character is incomplete, decoders with byte fallback (Llama 2) also break the characters before it
        # in the same run of bytes.
        for cut in range(1, 4):
            if not text.endswith(_BROKEN):
                break
            whole = self._decoded(shown[:-cut])
            if not whole.endswith(_BROKEN):
                return text if text.startswith(whole) else whole + _BROKEN
        return text

    def shown(self, ids: Sequence[int]) -> list[int]:
        """The ids that are not special tokens."""
        return [i for i in ids if i not in self.hidden]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _with_template(tokenizer: Any, name_or_path: str, data: DataConfig) -> dict[str, Any]:
    """Sets the chat template of the tokenizer where `data` has one; returns the options for it."""
    if data.chat_template is not None:
        tokenizer.chat_template = template_text(data.chat_template, "data.chat_template")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"data.chat=true: the tokenizer of model.name_or_path={name_or_path} has no chat template, as that of a "
            "base model; use a model that was trained on conversations, or set data.chat_template",
            key="data.chat",
        )
    if data.thinking is None:
        return {}
    if "enable_thinking" not in str(tokenizer.chat_template):
        raise ConfigError(
            f"data.thinking={str(data.thinking).lower()}: the chat template does not use enable_thinking; remove "
            "data.thinking",
            key="data.thinking",
        )
    return {"enable_thinking": data.thinking}


class StopCondition:
    """Finds the responses that end with their newest token: it is a stop token, or completes a stop text.

    `prompts` are the last shown tokens of each row's prompt: some tokenizers decode the first word of a text in another
    way without a prompt before it. A stop text must lie in the response; it cannot begin in the prompt.
    """

    def __init__(
        self, tokens: Tokens, ids: Sequence[int], texts: Sequence[str], prompts: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.ids = tuple(ids)
        self.texts = tuple(texts)
        self._tokens = tokens
        self._prompts = prompts
        self._on_device: dict[torch.device, Tensor] = {}
        # A stop text that the newest token completes lies within the last tokens, as each has at least one byte. The 4
        # more are for the rest of a character, and for a first token that may decode in another way.
        self._window = 4 * max(map(len, texts), default=0) + 4

    def after(self, queries: Int[Tensor, "B Q"], query_mask: Bool[Tensor, "B Q"]) -> StopCondition:
        """The condition for responses to these prompts, one per row, which are on the CPU."""
        rows = [query[mask].tolist() for query, mask in zip(queries, query_mask, strict=True)]
        prompts = [self._tokens.shown(row)[-_CONTEXT:] for row in rows]
        return StopCondition(self._tokens, self.ids, self.texts, prompts)

    def __call__(self, responses: Int[Tensor, "B t"]) -> Bool[Tensor, " B"]:
        """`responses` are the tokens sampled so far, t >= 1; rows that ended earlier may have any result.

        Stop texts are searched on the CPU, where the result then is; otherwise it is on the device of the responses.
        """
        if self.texts:
            responses = responses.cpu()
        ended = (responses[:, -1:] == self._ids_on(responses.device)).any(1)
        if self.texts:
            prompts = [[]] * len(responses) if self._prompts is None else self._prompts
            found = [
                self._completes(prompt, row if self._tokens.hidden.isdisjoint(row) else whole.tolist())
                for prompt, row, whole in zip(prompts, responses[:, -self._window :].tolist(), responses, strict=True)
            ]
            ended |= torch.tensor(found)
        return ended

    def _ids_on(self, device: torch.device) -> Int[Tensor, " n"]:
        """The stop tokens, copied to a device once."""
        if device not in self._on_device:
            self._on_device[device] = to_device(torch.tensor(self.ids, dtype=torch.int64), device)
        return self._on_device[device]

    def _completes(self, prompt: Sequence[int], response: list[int]) -> bool:
        if response[-1] in self._tokens.hidden:
            return False
        response = self._tokens.shown(response)[-self._window :]
        prompt = prompt if len(response) < self._window else []
        ids = [*prompt, *response]
        for start in range(4):  # skip the tail of a character that began earlier
            now = self._tokens.text(ids[start:])
            if not now.startswith(_BROKEN):
                break
        if not any(text in now for text in self.texts):
            return False
        border = _common_length(self._tokens.text(ids[start : len(prompt)]), now) if start < len(prompt) else 0
        # The newest token must write a part of the stop text: a stop text from before min_new_tokens does not count.
        before = _common_length(self._tokens.text(ids[start:-1]), now)
        return any(now.find(text, max(before - len(text) + 1, border)) >= 0 for text in self.texts)


def special_ids_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text, such as BOS and EOS.

    Both are empty if the ids of a text alone are not found among those of a usual call.
    """
    whole, own = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start], whole[start + len(own) :]
    return [], []


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
