"""Scores by a frozen sequence classifier with its own tokenizer.

Knows how texts are formed for the classifier, which output is the score, and its dtype. `classifier_checks.py` compares
the loaded classifier with its training. Knows no policy and no rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_accel.config.places import template_text
from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.data import reward_texts
from rlhf_accel.data.conversations import MESSAGES, answered
from rlhf_accel.data.reward_texts import Record
from rlhf_accel.models.classifier import load_tokenizer, most_tokens, settle_padding, stored_dtype
from rlhf_accel.models.loading import DTYPES
from rlhf_accel.models.masks import known_mask
from rlhf_accel.models.unmerged import load_classifier, on_base
from rlhf_accel.reward import classifier_checks
from rlhf_accel.system.arithmetic import computes_in_bf16
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.transfer import to_device, to_host


@dataclass(frozen=True, kw_only=True)
class SharedBase:
    """A classifier on the policy's base, with which all ranks may have to make each forward pass together."""

    classifier: Any
    """As `put_on_base` returns it."""
    policy: Callable[[], Any]
    """The policy as it is now."""
    passes: Callable[[int], int]
    """How many forward passes all ranks make if this one needs so many; asked by all of them."""


class Classifier:
    """A sequence classifier that scores texts by one label's logit or probability.

    Texts are formed as in its training, if that is recorded beside it. `sample_tokens` is the most tokens of the policy
    that a sample's prompt and response may have, if known. With `shared`, it is the one on the policy's base, and none
    is loaded. With `conversations`, the prompts are conversations, which the chat format reads in the column
    `messages`. Raises `ConfigError` if the classifier cannot be loaded, or does not score as in its training.
    """

    def __init__(
        self,
        config: RewardConfig,
        path: str,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
        sample_tokens: tuple[int, int] | None = None,
        shared: SharedBase | None = None,
        conversations: bool = False,
    ) -> None:
        self.config = config
        self.shared = shared
        self.conversations = conversations
        self.chat_field = config.chat_field or (MESSAGES if conversations else None)
        self.device = device
        self.setting = f"reward.model={config.model}"  # with which its errors begin
        self.record = reward_texts.read(path, self.setting)
        self.tokenizer = load_tokenizer(path, self.setting, trust_remote_code=trust_remote_code)
        if config.chat_template is not None:
            self.tokenizer.chat_template = template_text(config.chat_template, "reward.chat_template")
        if shared is None:
            in_bf16 = self.record is not None and self.record.precision == "bf16"
            self.dtype = reward_dtype(config, device, torch.bfloat16 if in_bf16 else stored_dtype(path))
            model = load_classifier(path, self.setting, trust_remote_code=trust_remote_code, dtype=self.dtype)
            self.model = model.to(device).eval().requires_grad_(False)
        else:
            self.model, self.dtype = shared.classifier, shared.classifier.dtype
        self.label, self.label_found = _find_label(config, self.model.config.id2label)
        settle_padding(self.model, self.tokenizer)
        self.max_tokens = most_tokens(self.model, self.tokenizer)
        if self.record is not None:
            self.max_tokens = min(self.max_tokens, self.record.max_tokens)
            self.tokenizer.truncation_side = self.record.truncation_side
        self.format = _settle_format(config, self.record, bool(self.tokenizer.chat_template))
        self.ends: tuple[str, str] | None = None  # special tokens in place of those that the tokenizer adds
        if self.format == "chat":
            record = self.record if self.record is not None and self.record.format == "chat" else None
            self.ends = reward_texts.template_ends(self.tokenizer) if record is None else record.ends
        classifier_checks.check(self, sample_tokens)
        self.read = self.cut = self.unread = 0  # texts scored, texts cut, texts cut before the response

    @property
    def reads_prompts_as_turns(self) -> bool:
        """Whether the policy's prompt becomes the user's turn of a conversation."""
        return self.format == "chat" and self.chat_field is None and self.config.text == "full"

    def tokens_read(self, prompt_tokens: int, new_tokens: int) -> int:
        """How many tokens the classifier gets of a sample, counted in the policy's tokens."""
        return new_tokens + (prompt_tokens if self.config.text == "full" else 0)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        rows: list[dict[str, list[int]]] = []
        batches: list[list[int]] = []
        failure: Exception | None = None
        try:
            rows, batches = self._batches(prompts, responses, columns)
        except Exception as error:  # raised when this rank has made the passes that the others make
            failure = error
        passes = len(batches) if self.shared is None else self.shared.passes(len(batches))
        found = to_host([self._scores(self.logits([rows[i] for i in batch])) for batch in batches])
        for _ in range(passes - len(batches)):
            self.logits(reward_texts.encode(self.tokenizer, [" "], self.max_tokens)[0])
        if failure is not None:
            raise failure
        scores = [0.0] * len(rows)
        for batch, part in zip(batches, found, strict=True):
            for i, score in zip(batch, part.tolist(), strict=True):
                scores[i] = score
        return scores

    def _batches(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
        """The encoded texts, and their positions in batches: texts of similar length need less padding."""
        texts = self.formed(prompts, responses, columns)
        rows, cut = self.encoded(texts)
        self._count(prompts, columns, rows, cut)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        size = self.config.batch_size
        return rows, [order[start : start + size] for start in range(0, len(order), size)]

    def formed(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[str]:
        """The texts that the model reads, before they are encoded."""
        alone = self.config.text == "response"
        if self.format == "plain":
            return [r if alone else p + r for p, r in zip(prompts, responses, strict=True)]
        given: Sequence[Any] = prompts
        if self.chat_field is not None and not alone:
            given = columns.get(self.chat_field, ())
            if not columns.get(self.chat_field) and len(prompts):
                raise KeyError(f"{self.chat_field} (reward.chat_field) is not a column of the data")
        turns = [answered([] if alone else p, r) for p, r in zip(given, responses, strict=True)]
        return [reward_texts.lay_out(self.tokenizer, conversation) for conversation in turns]

    def encoded(self, texts: Sequence[str]) -> tuple[list[dict[str, list[int]]], list[bool]]:
        """The model's inputs for each formed text, and whether it was cut."""
        return reward_texts.encode(self.tokenizer, texts, self.max_tokens, self.ends)

    @torch.no_grad()
    def logits(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> Float[Tensor, "B K"]:
        """All logits of these encoded texts, read as one batch, in fp32."""
        # The reward trainer passes ids only. Models from elsewhere may need the token types of their tokenizer.
        keys = ["input_ids"] if self.record is not None else list(rows[0])
        batch = {key: [list(row[key]) for row in rows] for key in keys}
        inputs = self.tokenizer.pad(batch, return_tensors="pt")
        moved = {name: to_device(tensor, self.device) for name, tensor in inputs.items()}
        with known_mask(inputs.get("attention_mask"), self.device), self._whole() as model:
            logits: Tensor = model(**moved).logits
        return logits.float()

    def _whole(self) -> contextlib.AbstractContextManager[Any]:
        """The model with its trunk, inside the context."""
        if self.shared is None:
            return contextlib.nullcontext(self.model)
        return on_base(self.model, self.shared.policy())

    def _count(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        rows: Sequence[Mapping[str, Sequence[int]]],
        cut: Sequence[bool],
    ) -> None:
        self.read += len(rows)
        self.cut += sum(cut)
        if self.config.text == "full" and any(cut):
            places = [i for i, is_cut in enumerate(cut) if is_cut]
            few = {name: [column[i] for i in places] for name, column in columns.items()}
            empty = self.formed([prompts[i] for i in places], [""] * len(places), few)
            without, _ = self.encoded(empty)
            self.unread += sum(rows[i] == alone for i, alone in zip(places, without, strict=True))

    def _scores(self, logits: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
        if self.config.output == "logit":
            return logits[:, self.label]
        probabilities = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
        return probabilities[:, self.label]


def reward_dtype(config: RewardConfig, device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """reward.dtype. `auto` is fp16 on a GPU; on a CPU, where fp16 is emulated, it is bf16 if the CPU computes in bf16,
    else fp32.

    It is never fp16 for weights that are `stored` or were trained in bf16: their activations may overflow in fp16.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type != "cpu" and stored != torch.bfloat16:
        return torch.float16
    return torch.bfloat16 if computes_in_bf16(device) else torch.float32


def _find_label(config: RewardConfig, id2label: Mapping[Any, str]) -> tuple[int, str]:
    """The output that reward.label means, and how it was found. A label's name takes precedence over a number."""
    names = {int(i): name for i, name in id2label.items()}
    label = config.label
    if label is None and len(names) == 1:
        return 0, "the only one"
    listed = ", ".join(str(names[i]) for i in sorted(names))
    if label is None:
        raise ConfigError(
            f"reward.label is not set, and {config.model} has {len(names)} labels: {listed}", key="reward.label"
        )
    by_name = [i for i in sorted(names) if str(names[i]) == label]
    if len(by_name) > 1:
        raise ConfigError(
            f"reward.label={label} is the name of outputs {', '.join(map(str, by_name))} of {config.model}; give each "
            "label its own name in its config.json (id2label)",
            key="reward.label",
        )
    if by_name:
        return by_name[0], "found by its name"
    by_number = [i for i in sorted(names) if str(i) == label]
    if by_number and len(names) > 1:
        return by_number[0], "found by its number, as no label has that name"
    raise ConfigError(f"reward.label={label} is not a label of {config.model}; it has {listed}", key="reward.label")


def _settle_format(config: RewardConfig, record: Record | None, has_template: bool) -> str:
    """plain or chat; raises `ConfigError` if the format is unknown or cannot be used."""
    setting = f"reward.model={config.model}"
    if config.format == "auto" and record is not None and record.format in ("mixed", "marked"):
        texts = f"texts with special tokens such as {record.marker}" if record.marker else "conversations and texts"
        raise ConfigError(
            f"{setting} was trained on {texts}, and the policy's texts have none of its marks; set reward.format=chat "
            "for its chat template around prompt and response, or plain to score them as they are",
            key="reward.format",
        )
    recorded = "plain" if record is None else record.format
    found = recorded if config.format == "auto" else config.format
    if found == "chat" and not has_template:
        raise ConfigError(
            f"{setting}: reward.format={config.format} needs a chat template, and its tokenizer has none; save one "
            "beside it",
            key="reward.format",
        )
    if found == "plain" and config.chat_field is not None:
        raise ConfigError(
            f"reward.chat_field={config.chat_field} is set, and {setting} reads plain text; set reward.format=chat, or "
            "remove it",
            key="reward.chat_field",
        )
    if found == "chat" and record is not None and record.turns:
        alone = len(record.turns) == 1
        if alone != (config.text == "response"):
            other, texts = ("response", "answers alone") if alone else ("full", "whole conversations")
            raise ConfigError(
                f"reward.text={config.text}: {setting} was trained on {texts}; set reward.text={other}",
                key="reward.text",
            )
    return found
