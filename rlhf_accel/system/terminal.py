"""Printing to a terminal: control characters in texts of models, data and files are shown as escapes, never obeyed.

A response, a prompt or a downloaded file may hold escape sequences, which clear the screen, rename the window or
overwrite earlier lines. All printing of this package goes through this file: `say`, or `Terminal` for rich.
"""

from __future__ import annotations

import logging
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats such as text direction, surrogates, separators
_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # the last two join letters of Persian and parts of emoji


def visible(text: str) -> str:
    r"""The text with control characters as escapes, except line breaks and tabs; idempotent.

    >>> visible("a\x1b[2Jb\r\n\u202e"), visible("naïve 中\u3000文")
    ('a\\x1b[2Jb\\r\n\\u202e', 'naïve 中\u3000文')
    """
    if text.isprintable():
        return text
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _OBEYED else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """The number with its noun.

    >>> counted(1, "sample"), counted(2_000, "sample"), counted(0, "process", "processes")
    ('1 sample', '2,000 samples', '0 processes')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def say(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print a text to standard output or standard error, and flush."""
    print(visible(text), end=end, file=sys.stderr if error else sys.stdout, flush=True)


class Terminal(Console):
    """rich's console, in which all text is made `visible` and only the control codes of rich itself are obeyed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def guard_messages() -> None:
    """Make the messages of Python `visible` too: warnings, tracebacks, and log records of all libraries. For commands;
    further calls do nothing."""
    if sys.excepthook is _show_traceback:
        return
    sys.excepthook = _show_traceback
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: visible(format_warning(*args, **kwargs))
    make_record = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        new = make_record(*args, **kwargs)
        with suppress(Exception):  # arguments that do not fit the message: logging reports them itself
            new.msg, new.args = visible(new.getMessage()), None
        return new

    logging.setLogRecordFactory(record)


# Warnings of libraries that a command says better itself, by their logger: on what it computes, and that a model of an
# unknown type needs code of its own.
_REMARKS = {
    "DeepSpeed": "Setting accelerator to CPU.",
    "transformers.configuration_utils": "to instantiate a model of type ``",
}


def drop_remarks() -> None:
    """Drop these warnings, and no others. Call it before transformers is imported, which imports DeepSpeed."""
    for name in _REMARKS:
        logging.getLogger(name).addFilter(_is_no_remark)


def _is_no_remark(record: logging.LogRecord) -> bool:
    return _REMARKS[record.name] not in record.getMessage()


def _show_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, where)), error=True, end="")
