"""Checks of the texts and the tokenizer: columns, prompt lengths, chat formats, stop texts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import psutil

from rlhf_accel.commands.checks.findings import Findings, Verdict
from rlhf_accel.config.schema import Config
from rlhf_accel.data import prompts as data
from rlhf_accel.data import wheels
from rlhf_accel.data.conversations import MESSAGES, Turns, answered
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.training.setup import check_prompt_tokens

_FIRST_ROWS = 64
# Markers of turns in chat formats. If the prompts contain one, their tokenizer should know it.
_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|start_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<|start_of_role|>", "<|endofprompt|>"),
)


def check_data(findings: Findings, config: Config) -> tuple[str | None, int]:
    """The checks; returns the folder of the policy, if it was found, and the memory of this process in bytes while it
    holds data and tokenizer and no model."""
    rows: Any = None
    tokens: Tokens | None = None
    path: str | None = None
    with findings.checking("data"):
        rows, held = data.split_rows(config.data)
        findings.note("ok", "data", f"{config.data.source} has {len(rows)} training texts and {len(held)} held out")
        findings.check("columns", _check_columns, rows, config.data.text_field)
    with findings.checking("tokenizer"):
        path = wheels.resolve_model(config.model.name_or_path)
        tokens = Tokens.load(path, trust_remote_code=config.model.trust_remote_code, data=config.data)
    if rows is not None and tokens is not None:
        with findings.checking("prompts"):
            _check_prompts(findings, config, rows, tokens)
        check = check_template if config.data.chat else check_format
        findings.check("chat template", check, config, rows, tokens)
    if tokens is not None and config.rollout.stop:
        findings.check("stop texts", check_stops, config.rollout.stop, tokens)
    return path, int(psutil.Process().memory_info().rss)


def _check_columns(rows: Any, text_field: str) -> Verdict:
    """Names the types of the first rows' values, which a reward function gets and its author may not expect."""
    first = rows[list(range(min(len(rows), _FIRST_ROWS)))]
    found = {name: " or ".join(sorted({type(value).__name__ for value in first[name]})) for name in first}
    column = data.text_column(rows, text_field)
    others = [f"{name} ({kinds})" for name, kinds in found.items() if name != column]
    return "ok", f"prompts are {column}; reward functions get {', '.join(others) or 'no other column'}"


def _check_prompts(findings: Findings, config: Config, rows: Any, tokens: Tokens) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = data.Prompts.of(rows, tokens, config.data, config.rollout.max_prompt_tokens, config.run.seed)
    findings.note("ok", "prompt tokens", check_prompt_tokens(prompts))
    dropped = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    for message in dropped:
        many = len(prompts) < 0.9 * len(rows)
        findings.note("warning" if many else "ok", "prompts", f"{message}; raise it or set data.prompt_tokens")
    if not dropped:
        findings.note("ok", "prompts", f"all {len(prompts)} fit rollout.max_prompt_tokens")
    if len(prompts) < config.rollout.batch_size:
        findings.note(
            "warning",
            "prompts",
            f"rollout.batch_size={config.rollout.batch_size} is above the number of prompts, {len(prompts)}, so some "
            "repeat within a step; lower it or provide more prompts",
        )


def check_stops(stop: Sequence[str], tokens: Tokens) -> Verdict:
    condition = tokens.stop_condition(stop)
    as_tokens = [f"{text!r} (token {tokens.added[text]})" for text in stop if text in tokens.added]
    as_texts = [repr(text) for text in condition.texts if text not in tokens.added]
    unknown = [text for text in condition.texts if text in _MARKERS and text not in tokens.added]
    message = f"a response ends at {' and '.join(as_tokens + as_texts)}"
    if unknown:
        return "warning", (
            f"{message}, but this tokenizer has no token for {unknown[0]}, so the policy may never write it; set "
            "rollout.stop to the end-of-turn marker of model.name_or_path"
        )
    return "ok", message


def check_format(config: Config, rows: Any, tokens: Tokens) -> Verdict:
    texts = data.checked_texts(rows, config.data.source, data.text_column(rows, config.data.text_field))
    template = str(tokens.tokenizer.chat_template or "")
    foreign: list[tuple[int, int, str]] = []
    for marker in _MARKERS:
        count = sum(marker in text for text in texts)
        pieces = len(tokens.encode([marker])[0]) - len(tokens.prefix)
        if count and pieces > 1 and marker not in tokens.added and marker not in template:
            foreign.append((count, pieces, marker))
    if foreign:
        count, pieces, marker = max(foreign)
        message = (
            f"{count} of {len(texts)} prompts contain {marker}, which the policy's tokenizer splits into {pieces} "
            "tokens and its chat template does not use: they were written for another model; format data.source for "
            "model.name_or_path"
        )
        return "problem" if 2 * count > len(texts) else "warning", message
    if template and not any(marker in text for marker in _MARKERS for text in texts[:_FIRST_ROWS]):
        return "ok", (
            "the policy has one, but the prompts are plain text, which the policy continues as it is; set "
            "data.chat=true to have it answer them"
        )
    return "ok", "the prompts contain no marker that the tokenizer does not know"


def check_template(config: Config, rows: Any, tokens: Tokens) -> Verdict:
    """Whether a response begins where the chat template has an answer begin."""
    few = data.Prompts.of(rows, tokens, config.data, config.rollout.max_prompt_tokens, config.run.seed).fixed(1)
    turns = few.columns[MESSAGES][0]
    shown = f"a conversation becomes {tokens.lay_out(turns)!r:.200}"
    missing = _before_an_answer(tokens, turns)
    if missing:
        return "problem", (
            f"{shown}, without {missing!r:.40}, which the template writes before an answer: it has no generation "
            "prompt; set data.chat_template to one that writes this where add_generation_prompt is true"
        )
    written = [i for i in few.queries[0].tolist() if tokens.text([i]).strip() or i in tokens.hidden]
    if written[-1] == tokens.eos_id:
        return "problem", (
            f"{shown}, which ends with the end-of-text token, so the policy would respond to a finished text; set "
            "data.chat_template to one that writes no end where add_generation_prompt is true"
        )
    if "strftime_now" in str(tokens.tokenizer.chat_template):
        return "warning", (
            f"{shown}; the template writes the current date, so a run that is resumed on another day reads other "
            "prompts; set data.chat_template to one without it"
        )
    return "ok", shown


def _before_an_answer(tokens: Tokens, turns: Turns) -> str:
    """What a template without a generation prompt writes between prompt and answer, if it is more than white space."""
    prompt, answer = tokens.lay_out(turns), "An answer."
    template, options = tokens.tokenizer.apply_chat_template, tokens.template_options
    if template(turns, tokenize=False, **options) != prompt:
        return ""
    whole = str(template(answered(turns, answer), tokenize=False, **options))
    between = whole.removeprefix(prompt).partition(answer)[0]
    return between if whole.startswith(prompt) and between.strip() else ""
