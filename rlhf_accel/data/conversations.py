"""Conversations as prompts: the turns in a cell of the data, with the run's system turn, and the text that shows them.

Knows the form of turns; knows no tokenizer and no chat template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Turns = list[dict[str, str]]

MESSAGES = "messages"  # the column in which rewards get the conversations


def is_conversation(content: Any) -> bool:
    """Whether it is a list, not empty, of {role, content} with two texts."""
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in content
        )
    )


def is_text(value: Any) -> bool:
    """Whether it is a text that is not blank and that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: valid in JSON, but no tokenizer reads it
        return False
    return True


def turns_of(value: Any) -> Turns | None:
    """The conversation to respond to: a list of {role, content}, the same as JSON, or a text as one turn of the user.

    Other keys of a turn are left out, and so is an answer at the end. None if nothing is left to respond to.

    >>> turns_of("Hi")
    [{'role': 'user', 'content': 'Hi'}]
    >>> turns_of('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]')
    [{'role': 'user', 'content': 'Hi'}]
    >>> turns_of([{"role": "system", "content": "Be brief."}]) is None
    True
    """
    value = _parsed(value)
    if is_text(value):
        return [{"role": "user", "content": value}]
    if not is_conversation(value):
        return None
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in value]
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    readable = all(is_text(turn["content"]) or not turn["content"].strip() for turn in turns)
    if not turns or not readable or turns[-1]["role"] == "system" or not is_text(turns[-1]["content"]):
        return None
    return turns


def with_system(turns: Turns, system: str | None) -> Turns:
    """The turns with this system turn, which replaces their own; unchanged if it is None.

    >>> with_system([{"role": "user", "content": "Hi"}], "Be brief.")
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
    """
    if system is None:
        return turns
    return [{"role": "system", "content": system}, *(turn for turn in turns if turn["role"] != "system")]


def answered(prompt: str | Turns, response: str) -> Turns:
    """A conversation that ends with the response. If the prompt is a conversation, an answer at its end is removed.

    >>> answered("Hi", "Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return [*turns, {"role": "assistant", "content": response}]


def transcript(turns: Sequence[dict[str, str]]) -> str:
    r"""The conversation as a text for people, which a response continues.

    >>> transcript([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    'system: Be brief.\nuser: Hi\nassistant: '
    """
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant: "


def identity(turns: Turns) -> str:
    """A text that tells conversations apart: the content of a single turn of the user, else JSON.

    >>> identity([{"role": "user", "content": "Hi"}])
    'Hi'
    """
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    return json.dumps(turns, ensure_ascii=False)


def _parsed(value: Any) -> Any:
    """A conversation that is written as JSON, as in a CSV file; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if is_conversation(found) else value
