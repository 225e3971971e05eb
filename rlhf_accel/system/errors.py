"""Errors that end a command with one line for its user; the key to change and the facts are fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_accel.system.terminal import visible


class ConfigError(ValueError):
    """A config or an input that cannot work: one line with what was found, what was expected and the key to change.

    The commands print it and exit with status 2. Line breaks in the message, such as a library's, become spaces.
    `key` is the setting to change: a key of the config or of the launch's files, a command-line option or an
    environment variable; None if no single one is at fault. `facts` are named numbers and strings for code that reacts
    to the error, never parts of the message. If keys contradict each other, the fact `others` names the other keys.
    """

    def __init__(self, message: str, *, key: str | None = None, **facts: Any) -> None:
        super().__init__(_one_line(message))
        self.key = key
        self.facts = facts


class Finished(ConfigError):
    """Nothing is left to do: the commands print the message and exit with status 0."""


class RunFailed(RuntimeError):
    """A run that cannot continue, raised after everything was saved that could be: one line with what happened and how
    to resume.

    The commands print it and exit with status 1. Line breaks become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def key_in(named: str) -> str:
    """The key in `key=value` or `--option value`, the beginning of a message.

    >>> key_in("reward.model=gpt2"), key_in("--base gpt2"), key_in("data.pair_fields: row 1")
    ('reward.model', '--base', 'data.pair_fields')
    """
    return named.partition(" ")[0].partition("=")[0].removesuffix(":")


def first_line(error: BaseException) -> str:
    r"""The first line of an error's text, or its type if it has no text.

    >>> first_line(ValueError("no such tensor\n  in file x")), first_line(ValueError())
    ('no such tensor', 'ValueError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
    r"""An error's type and text on one line of at most 200 characters.

    >>> in_one_line(RuntimeError("a stream\n  is captured"))
    'RuntimeError: a stream is captured'
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def as_config_error(message: str, *, key: str | None = None) -> Iterator[None]:
    """Turn any error inside the context into a `ConfigError`: the message, and the error's first line in brackets.

    For calls of libraries: a missing, broken or foreign file raises errors of many types. A `ConfigError` is passed on.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{message} ({first_line(error)})", key=key) from error


def why(error: BaseException) -> str:
    """The reason of an error: the system's where it has one, such as `No space left on device`, else its text."""
    return str(getattr(error, "strerror", None) or error)


def _one_line(message: str) -> str:
    return visible(" ".join(line.strip() for line in message.splitlines()))
