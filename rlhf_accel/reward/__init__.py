"""Scores of texts: a frozen classifier with its own tokenizer, Python functions, a server, and weighted sums of them.

Rewards see text only. Whatever a reward returns becomes fp32 and is checked here. Knows no policy and no rank.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf_accel.config.rules import gold_name
from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.config.trust import is_ours
from rlhf_accel.data import reward_texts
from rlhf_accel.data.reward_texts import Record
from rlhf_accel.models.classifier import (
    has_position_table,
    load_tokenizer,
    most_tokens,
    settle_padding,
    stored_dtype,
)
from rlhf_accel.models.loading import DTYPES, load_pretrained
from rlhf_accel.models.probes import scored_alone, trained_scored
from rlhf_accel.reward.borrowed import restored_globals
from rlhf_accel.system.arithmetic import computes_in_bf16
from rlhf_accel.system.errors import ConfigError, key_in

RewardFunction = Callable[..., Sequence[float]]
T = TypeVar("T")

TOKEN_VARIABLE = "RLHF_ACCEL_REWARD_TOKEN"
_LONGEST_TRIED = 4096  # tokens
LARGEST_ANSWER = 64 << 20  # bytes of a server's answer: a million scores fit many times

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward raised, took too long, or returned something that is not one number for each response.

    `key` and `facts` as those of a `ConfigError`: `raised` names the exception, `score` is the one that is not finite.
    """

    def __init__(self, message: str, *, key: str | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.key = key
        self.facts = facts


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Weighted sum of named terms, then shifted, scaled and clipped: what the objective calls the score."""

    terms: tuple[tuple[str, float, RewardFunction], ...]  # name (a config key's value), weight, function
    mean: float = 0.0
    std: float = 1.0
    clip: float | None = None
    retries: int = 0
    retry_wait: float = 1.0  # seconds, doubling
    timeout: float | None = None  # seconds

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Float[Tensor, " B"]:
        """fp32 scores (B,) on the CPU; one that is not finite is for the caller to find.

        Raises `RewardError` naming the term that failed, after it failed `retries` times more.
        """
        return self._sum([self._patiently(name, term, prompts, responses, columns) for name, _, term in self.terms])

    def try_out(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Float[Tensor, " B"]:
        """The same, but at the first failure it raises `RewardError`, and for a score that is not finite too."""
        parts = []
        for name, _, term in self.terms:
            parts.append(_call(name, term, prompts, responses, columns, self.timeout))
            _check_finite(name, parts[-1], responses)
        return self._sum(parts)

    def finite(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Float[Tensor, " B"]:
        """As a call, but a score that is not finite raises `RewardError` too."""
        parts = [self._patiently(name, term, prompts, responses, columns) for name, _, term in self.terms]
        for (name, _, _), part in zip(self.terms, parts, strict=True):
            _check_finite(name, part, responses)
        return self._sum(parts)

    def _sum(self, parts: Sequence[Float[Tensor, " B"]]) -> Float[Tensor, " B"]:
        total = sum(weight * part for (_, weight, _), part in zip(self.terms, parts, strict=True))
        scores = ((torch.as_tensor(total) - self.mean) / self.std).float()
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def _patiently(
        self,
        name: str,
        function: RewardFunction,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Float[Tensor, " B"]:
        retries = 0 if isinstance(function, Classifier) else self.retries  # which would fail in the same way again
        for attempt in range(retries):
            try:
                return _call(name, function, prompts, responses, columns, self.timeout)
            except RewardError as error:
                wait = self.retry_wait * 2**attempt
                logger.warning("%s; trying again in %g s (%d of %d)", error, wait, attempt + 1, retries)
                time.sleep(wait)
        return _call(name, function, prompts, responses, columns, self.timeout)

    def calibrated(self, scores: Float[Tensor, " N"]) -> Reward:
        """A reward for which these scores, of samples of the reference, would have had mean 0 and variance 1
        (Ziegler et al. 2019, section 2.1). Raises `ConfigError` if they do not vary or are not finite."""
        if not scores.isfinite().all():
            raise ConfigError(
                "reward.calibrate=true, but not all scores of the reference samples are finite", key="reward.calibrate"
            )
        std, mean = torch.std_mean(scores.double() * self.std + self.mean)
        if not std > 1e-8:
            raise ConfigError(
                f"reward.calibrate=true, but all {len(scores)} reference samples score {mean:.4g}; the reward "
                "cannot tell them apart",
                key="reward.calibrate",
            )
        return replace(self, mean=float(mean), std=float(std))


class Classifier:
    """A sequence classifier that scores texts by one label's logit or probability.

    Texts are formed as they were in its training, where that is recorded beside it; what can be compared with the
    training is compared when it is loaded. Raises `ConfigError` for whatever differs. `sample_tokens` is how many of
    the policy's tokens a sample (prompt, response) may have, where that is known.
    """

    def __init__(
        self,
        config: RewardConfig,
        path: str,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
        sample_tokens: tuple[int, int] | None = None,
    ) -> None:
        self.config = config
        self.device = device
        said = f"reward.model={config.model}"
        self.record = reward_texts.read(path, said)
        in_bf16 = self.record is not None and self.record.precision == "bf16"
        self.dtype = reward_dtype(config, device, torch.bfloat16 if in_bf16 else stored_dtype(path))
        self.tokenizer = load_tokenizer(path, said, trust_remote_code=trust_remote_code)
        model = load_pretrained(
            AutoModelForSequenceClassification, path, said, trust_remote_code=trust_remote_code, dtype=self.dtype
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.label, self.label_found = self._label_index()
        settle_padding(self.model, self.tokenizer)
        self.max_tokens = most_tokens(self.model, self.tokenizer)
        if self.record is not None:
            self.max_tokens = min(self.max_tokens, self.record.max_tokens)
            self.tokenizer.truncation_side = self.record.truncation_side
        self.format = self._settled_format()
        self._check(sample_tokens)
        self.read = self.cut = self.unread = 0  # texts; those cut; those of which nothing of the response was read

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        texts = self.formed(prompts, responses, columns)
        rows, cut = reward_texts.encode(self.tokenizer, texts, self.max_tokens)
        self._count(prompts, columns, rows, cut)
        # Texts of like length together: less padding to read.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            logits = self.logits([rows[i] for i in chosen])
            for i, score in zip(chosen, self._scores(logits).tolist(), strict=True):
                scores[i] = score
        return scores

    def formed(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[str]:
        """The texts that the model reads, before they are encoded."""
        alone = self.config.text == "response"
        if self.format == "plain":
            return [r if alone else p + r for p, r in zip(prompts, responses, strict=True)]
        given: Sequence[Any] = prompts
        if self.config.chat_field is not None and not alone:
            given = columns.get(self.config.chat_field, ())
            if not columns.get(self.config.chat_field) and len(prompts):
                raise KeyError(f"{self.config.chat_field} (reward.chat_field) is not a column of the data")
        turns = [reward_texts.answered([] if alone else p, r) for p, r in zip(given, responses, strict=True)]
        return [reward_texts.lay_out(self.tokenizer, conversation) for conversation in turns]

    @torch.no_grad()
    def logits(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> Float[Tensor, "B K"]:
        """All logits of these encoded texts, read as one batch, in fp32."""
        # The reward trainer reads ids alone; for models from elsewhere, token types are their tokenizer's.
        keys = ["input_ids"] if self.record is not None else list(rows[0])
        batch = {key: [list(row[key]) for row in rows] for key in keys}
        inputs = self.tokenizer.pad(batch, return_tensors="pt").to(self.device)
        logits: Tensor = self.model(**inputs).logits
        return logits.float()

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
            without, _ = reward_texts.encode(self.tokenizer, empty, self.max_tokens)
            self.unread += sum(rows[i] == alone for i, alone in zip(places, without, strict=True))

    def _scores(self, logits: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
        if self.config.output == "logit":
            return logits[:, self.label]
        probabilities = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
        return probabilities[:, self.label]

    def _label_index(self) -> tuple[int, str]:
        """The output that reward.label means, and how it was found: a name of any label goes before a number."""
        names = {int(i): name for i, name in self.model.config.id2label.items()}
        label = self.config.label
        if label is None and len(names) == 1:
            return 0, "the only one"
        listed = ", ".join(str(names[i]) for i in sorted(names))
        if label is None:
            raise ConfigError(
                f"reward.label is not set, and {self.config.model} has {len(names)} labels: {listed}",
                key="reward.label",
            )
        by_name = [i for i in sorted(names) if str(names[i]) == label]
        if len(by_name) > 1:
            raise ConfigError(
                f"reward.label={label} is the name of outputs {', '.join(map(str, by_name))} of {self.config.model}; "
                "give the labels names of their own in its config.json (id2label)",
                key="reward.label",
            )
        if by_name:
            return by_name[0], "found by its name"
        by_number = [i for i in sorted(names) if str(i) == label]
        if by_number and len(names) > 1:
            return by_number[0], "found by its number, as no label has that name"
        raise ConfigError(
            f"reward.label={label} is not a label of {self.config.model}; it has {listed}", key="reward.label"
        )

    def _settled_format(self) -> str:
        """plain or chat; raises `ConfigError` where that is not known, or cannot be had."""
        asked, record, said = self.config.format, self.record, f"reward.model={self.config.model}"
        if asked == "auto" and record is not None and record.format in ("mixed", "marked"):
            what = f"texts with special tokens such as {record.marker}" if record.marker else "conversations and texts"
            raise ConfigError(
                f"{said} was trained on {what}, and the policy's texts have none of its marks; set reward.format=chat "
                "for its chat template around prompt and response, or plain to score them as they are",
                key="reward.format",
            )
        recorded = "plain" if record is None else record.format
        found = recorded if asked == "auto" else asked
        if found == "chat" and not self.tokenizer.chat_template:
            raise ConfigError(
                f"{said}: its tokenizer has no chat template, which reward.format={asked} needs; save one beside it",
                key="reward.format",
            )
        if found == "plain" and self.config.chat_field is not None:
            raise ConfigError(
                f"reward.chat_field={self.config.chat_field} is set, and {said} reads plain text; set "
                "reward.format=chat, or remove it",
                key="reward.chat_field",
            )
        if found == "chat" and record is not None and record.turns:
            alone = len(record.turns) == 1
            if alone != (self.config.text == "response"):
                other, what = ("response", "answers alone") if alone else ("full", "whole conversations")
                raise ConfigError(
                    f"reward.text={self.config.text}: {said} was trained on {what}; set reward.text={other}",
                    key="reward.text",
                )
        return found

    # What the model does here, against what it did in training and what it does with a text alone

    def _check(self, sample_tokens: tuple[int, int] | None) -> None:
        said = f"reward.model={self.config.model}"
        if self.record is not None:
            self._check_record(self.record, said)
        texts = ["A film.", "The film is long, and it is worth every minute of it.", "It is dull. " * 12]
        rows, _ = reward_texts.encode(self.tokenizer, texts, self.max_tokens)
        if has_position_table(self.model):
            self._check_longest(said, sample_tokens)
        self._check_finite(rows, said)
        if self.config.batch_size > 1:
            finding = scored_alone(self.logits, rows, self.dtype)
            if not finding.passed:
                raise ConfigError(
                    f"{said}: {finding.message} (more than {finding.limit:.2g}): {type(self.model).__name__} reads "
                    "padding; set reward.batch_size=1, or take another model",
                    key="reward.batch_size",
                    difference=finding.difference,
                )

    @property
    def reads_prompts_as_turns(self) -> bool:
        """Whether the policy's prompt becomes the user's turn of a conversation."""
        return self.format == "chat" and self.config.chat_field is None and self.config.text == "full"

    def _check_record(self, record: Record, said: str) -> None:
        now_around = reward_texts.around(self.tokenizer)
        if now_around != record.around:
            raise ConfigError(
                f"{said}: its tokenizer puts {now_around} around every text, and in training it put {record.around}; "
                "put the tokenizer of the training back beside it",
                key="reward.model",
            )
        if self.format == record.format == "chat" and record.turns is not None:
            now = reward_texts.lay_out(self.tokenizer, record.turns)
            if now != record.laid_out:
                raise ConfigError(
                    f"{said}: its chat template makes {now!r:.80} of a conversation of which training made "
                    f"{record.laid_out!r:.80}; put the tokenizer of the training back beside it, or train again",
                    key="reward.model",
                )
        texts = [probe.text for probe in record.probes]
        rows, _ = reward_texts.encode(self.tokenizer, texts, self.max_tokens)
        if any(len(probe.scores) != self.model.config.num_labels for probe in record.probes):
            raise ConfigError(
                f"{said} has {self.model.config.num_labels} outputs, and its {reward_texts.FILE} other numbers of "
                "scores; put back what training wrote",
                key="reward.model",
            )
        scores = torch.cat([self.logits([row]) for row in rows]) if rows else torch.zeros(0, 1)
        then = torch.tensor([probe.scores for probe in record.probes]) if rows else scores
        ids = [row["input_ids"] for row in rows]
        finding = trained_scored(texts, ids, scores, [probe.ids for probe in record.probes], then, self.dtype)
        if not finding.passed:
            dtype = str(self.dtype).removeprefix("torch.")
            of_weights = f"its weights are others, or {dtype} rounds too much"
            why = "its tokenizer is another" if finding.unit == "texts" else of_weights
            raise ConfigError(
                f"{said}: {finding.message}: {why}; put back what training wrote, or set reward.dtype=fp32",
                key="reward.model",
                difference=finding.difference,
            )

    def _check_longest(self, said: str, sample_tokens: tuple[int, int] | None) -> None:
        """A text of as many tokens as the model is taken to read, or as a run sends: the table may end before that."""
        tokens = min(self.max_tokens, _LONGEST_TRIED)
        if sample_tokens is not None:
            # Twice: this tokenizer may make more tokens of a text than the policy's, and a chat template adds some.
            tokens = min(tokens, 2 * _read_tokens(self, *sample_tokens))
        rows, _ = reward_texts.encode(self.tokenizer, ["a film " * tokens], tokens)
        try:
            self._check_finite(rows, said)
        except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of the model
            raise
        except (IndexError, RuntimeError) as error:  # on a GPU an index out of range is a RuntimeError
            known = self.model.get_input_embeddings().weight.shape[0]
            if max(rows[0]["input_ids"]) >= known:
                raise ConfigError(
                    f"{said}: its tokenizer has {len(self.tokenizer)} ids and the model {known} embeddings: it is "
                    "another model's; save the right one beside it",
                    key="reward.model",
                ) from error
            raise ConfigError(
                f"{said} cannot read a text of {tokens} tokens, as its files let expect "
                f"({str(error).splitlines()[0]}); set model_max_length in its tokenizer_config.json to what it reads",
                key="reward.model",
                tokens=tokens,
            ) from error

    def _check_finite(self, rows: Sequence[Mapping[str, Sequence[int]]], said: str) -> None:
        if not all(self.logits([row]).isfinite().all() for row in rows):
            half = self.dtype == torch.float16
            why = "which fp16 overflows; set reward.dtype to bf16 or fp32" if half else "so its weights are damaged"
            dtype = str(self.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{said}: the score of an ordinary text is not finite in {dtype}, {why}",
                key="reward.dtype" if half else "reward.model",
                dtype=dtype,
            )


class RemoteReward:
    """Scores from a server: `reward.url`'s contract, which `scripts/reward_server.py` speaks too.

    The token in RLHF_ACCEL_REWARD_TOKEN, if set, is sent to that address only: redirections are not followed.
    """

    def __init__(self, url: str, timeout: float | None) -> None:
        self.url = url
        self.timeout = timeout or 60.0
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        if not all("!" <= character <= "~" for character in self._token):
            raise ConfigError(
                f"{TOKEN_VARIABLE} holds white space or what is not ASCII; look how it was set", key=TOKEN_VARIABLE
            )
        loopback = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
        # A proxy of the environment cannot reach this machine's own loopback.
        self._handlers: tuple[Any, ...] = (_NoRedirection, *([ProxyHandler({})] if loopback else []))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        body = json.dumps({"prompts": list(prompts), "responses": list(responses), "columns": columns}, default=str)
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        text = self._answer(Request(self.url, body.encode(), headers))
        if len(text) > LARGEST_ANSWER:
            raise ValueError(f"the answer has more than {LARGEST_ANSWER >> 20} MiB")
        scores = json.loads(text)["scores"]
        if not isinstance(scores, list) or not all(score is None or type(score) in (int, float) for score in scores):
            raise TypeError('expected {"scores": [number, …]}, null for one that is not finite')
        return [math.nan if score is None else score for score in scores]

    def _answer(self, request: Request) -> bytes:
        """What the server answers, all of it within the timeout, which for urllib is that of each read."""
        sockets: list[socket.socket] = []
        late = threading.Event()

        def cut() -> None:
            late.set()
            for connection in sockets:
                with suppress(OSError):  # it has been closed
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut)
        timer.daemon = True
        timer.start()
        opener = build_opener(_Http(sockets), _Https(sockets), *self._handlers)
        try:
            try:
                with opener.open(request, timeout=self.timeout) as answer:
                    text: bytes = answer.read(LARGEST_ANSWER + 1)
            except HTTPError as error:
                said = " ".join(error.read(200).decode(errors="replace").split())
                raise RuntimeError(f"the server answered {error.code} {error.reason} ({said})") from None
            except URLError as error:
                raise ConnectionError(f"{error.reason}; is the server running?") from None
        except (OSError, HTTPException, RuntimeError):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():
            raise TimeoutError(f"no answer within reward.timeout={self.timeout:g} s")
        return text


class _Http(HTTPHandler):
    """Notes the sockets that it opens."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        super().__init__()
        self._sockets = sockets

    def http_open(self, request: Request) -> Any:
        return self.do_open(_noted(HTTPConnection, self._sockets), request)


class _Https(HTTPSHandler):
    def __init__(self, sockets: list[socket.socket]) -> None:
        super().__init__()
        self._sockets = sockets

    def https_open(self, request: Request) -> Any:
        return self.do_open(_noted(HTTPSConnection, self._sockets), request)


def _noted(kind: Any, sockets: list[socket.socket]) -> Any:
    class Connection(kind):  # type: ignore[misc]  # one of two classes
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    return Connection


class _NoRedirection(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def reward_dtype(config: RewardConfig, device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """reward.dtype; auto is fp16 on a GPU, and on a CPU, where fp16 is emulated, bf16 if it has the units, else fp32.

    For weights that are `stored` or were trained in bf16 it is never fp16, in which their activations may overflow.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type != "cpu" and stored != torch.bfloat16:
        return torch.float16
    return torch.bfloat16 if computes_in_bf16(device) else torch.float32


def cautions(reward: Reward, prompt_tokens: int, new_tokens: int) -> list[tuple[str, str]]:
    """What a run should know of how its classifiers get their texts: (what was looked at, one line) for each.

    The policy's prompts and responses have up to so many tokens.
    """
    found = []
    for name, _, term in reward.terms:
        if not isinstance(term, Classifier):
            continue
        longest = _read_tokens(term, prompt_tokens, new_tokens)
        if longest > term.max_tokens:
            training = " (data.max_tokens of its training)" if term.record else ""
            end = "beginning" if term.tokenizer.truncation_side == "left" else "end"
            whole = (
                ", and of the longest prompts' responses nothing is read" if prompt_tokens >= term.max_tokens else ""
            )
            fix = "lower rollout.max_prompt_tokens" + (", or train it again with more" if term.record else "")
            fix = f"set reward.text=response, {fix}" if term.config.text == "full" else fix
            said = f"{name} reads {term.max_tokens} tokens{training}, and samples have up to {longest} of the policy's"
            found.append(("reward window", f"{said}: the {end} may go unread{whole}; {fix}"))
        if term.record is None and term.tokenizer.chat_template and term.config.format == "auto":
            found.append(
                (
                    "reward texts",
                    f"{name} has a chat template and no record of how its texts were formed in training: they are "
                    "scored plain; if it was trained on conversations set reward.format=chat, else plain",
                )
            )
        if term.record is not None and term.record.format not in ("mixed", "marked", term.format):
            said = f"reward.format={term.format}, but {name} was trained on {term.record.format} texts"
            found.append(("reward texts", f"{said}: its scores mean little; set auto"))
    return found


def _read_tokens(term: Classifier, prompt_tokens: int, new_tokens: int) -> int:
    """How many of the policy's tokens a sample has that the classifier reads."""
    return new_tokens + (prompt_tokens if term.config.text == "full" else 0)


def load_reward(
    config: RewardConfig,
    path: str | None,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    sample_tokens: tuple[int, int] | None = None,
) -> Reward:
    """The reward that the config describes; `path` is where reward.model lies. Code that comes with it runs only if
    `trust_remote_code`, which is model.trust_remote_code. `sample_tokens` is what `Classifier` takes.

    Raises `ConfigError` when a part cannot be loaded or nothing is asked for.
    """
    names: list[str] = []
    functions: list[RewardFunction] = []
    if config.model is not None and path is not None:
        names.append(f"reward.model={config.model}")
        functions.append(
            Classifier(config, path, device, trust_remote_code=trust_remote_code, sample_tokens=sample_tokens)
        )
    if config.url is not None:
        names.append(f"reward.url={config.url}")
        functions.append(RemoteReward(config.url, config.timeout))
    for target in config.function:
        names.append(f"reward.function={target}")
        functions.append(import_function(target, folder=config.import_from))
    if not functions:
        raise ConfigError(
            "no reward is given; set reward.model, reward.url or reward.function, or pass PPOTrainer(reward=…)",
            key="reward.model",
        )
    weights = config.weights or (1.0,) * len(functions)
    return reward_of(config, tuple(zip(names, weights, functions, strict=True)))


def reward_of(config: RewardConfig, terms: tuple[tuple[str, float, RewardFunction], ...]) -> Reward:
    """The terms, clipped and retried as the config says."""
    return Reward(
        terms=terms, clip=config.clip, retries=config.retries, retry_wait=config.retry_wait, timeout=config.timeout
    )


def load_golds(config: RewardConfig) -> dict[str, Reward]:
    """The rewards of reward.gold by the names of their figures: called and retried like others, their scores as they
    are. Raises `ConfigError` if one cannot be imported."""
    golds = {}
    for target in config.gold:
        terms = ((f"reward.gold={target}", 1.0, import_function(target, "reward.gold", config.import_from)),)
        golds[gold_name(target)] = replace(reward_of(config, terms), clip=None)
    return golds


def vader(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """The sentiment of prompt + response in [-1, 1] by a lexicon: the compound of VADER (Hutto and Gilbert 2014).

    Raises `ModuleNotFoundError` where the package vaderSentiment is not installed.
    """
    analyzer = _vader_analyzer()
    return [analyzer.polarity_scores(p + r)["compound"] for p, r in zip(prompts, responses, strict=True)]


@functools.cache
def _vader_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; pip install vaderSentiment, or leave it out with --reward.gold '[]'"
        ) from error
    return SentimentIntensityAnalyzer()


def import_function(target: str, key: str = "reward.function", folder: str | None = None) -> RewardFunction:
    """The callable at `package.module:callable`; `folder`, or else the working folder, is on the path, as for
    `python -m`.

    Raises `ConfigError` naming `key`, the config's key that it came from, if there is none.
    """
    place = folder or str(Path.cwd())
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"{key}={target}: expected package.module:callable", key=key)
    if not is_ours(target) and place not in sys.path:
        sys.path.insert(0, place)
    try:
        with restored_globals(f"{key}={target}: importing {module_name}"):
            module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module does when it is imported, as ending the process
        reason = " ".join(_in_words(error).split())
        raise ConfigError(
            f"{key}={target}: {module_name} cannot be imported ({reason}) from {place} or PYTHONPATH", key=key
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}={target}: the module {module_name} has no {name}", key=key)
    function: RewardFunction = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{key}={target}: {name} is not callable", key=key)
    return function


def _call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    timeout: float | None,
) -> Float[Tensor, " B"]:
    if not prompts:  # a rank without a share: a user's function need not know what to make of nothing
        return torch.zeros(0, dtype=torch.float64)
    if isinstance(function, RemoteReward):
        timeout = timeout or function.timeout
    try:
        with restored_globals(name):
            values = _within(
                None if isinstance(function, Classifier) else timeout,
                lambda: function(
                    list(prompts), list(responses), **{key: list(value) for key, value in columns.items()}
                ),
            )
    except KeyboardInterrupt:  # which is Ctrl-C
        raise
    except BaseException as error:  # a reward ends neither the process nor a generator of ours
        raise RewardError(f"{name} raised {_in_words(error)}", key=key_in(name), raised=type(error).__name__) from error
    try:
        scores = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except Exception as error:  # whatever it returned may raise when it is read
        raise RewardError(
            f"{name} returned {_shown(values)}; return one number for each response", key=key_in(name)
        ) from error
    if scores.shape != (len(prompts),):
        raise RewardError(
            f"{name} returned {_amount(scores)} for {len(prompts)} responses; return one number for each",
            key=key_in(name),
        )
    return scores


def _check_finite(name: str, scores: Float[Tensor, " B"], responses: Sequence[str]) -> None:
    for score, response in zip(scores.tolist(), responses, strict=True):
        if not math.isfinite(score):
            raise RewardError(
                f"{name} returned {score} for the response {response!r:.80}; return finite numbers",
                key=key_in(name),
                score=score,
            )


def _within(seconds: float | None, work: Callable[[], T]) -> T:
    """What the work returns or raises; `TimeoutError` if it has not after so many seconds, and goes on unheeded."""
    if seconds is None:
        return work()
    outcome: list[Callable[[], T]] = []

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            raised = error
            outcome.append(lambda: _raise(raised))
        else:
            outcome.append(lambda: value)

    # A daemon: a function that never ends must not keep the process from leaving.
    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within reward.timeout={seconds:g} s")
    return outcome[0]()


def _raise(error: BaseException) -> Any:
    raise error


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of an exception whose text cannot be made
        return type(error).__name__


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"something of type {type(value).__name__}"


def _amount(scores: Tensor) -> str:
    return f"{len(scores)} scores" if scores.ndim == 1 else f"an array of shape {tuple(scores.shape)}"
