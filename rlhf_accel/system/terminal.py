"""Text on its way to a terminal: what models, data and files hold is shown there and never obeyed.

A response, a prompt or a folder from elsewhere may hold escape sequences, which clear a screen, rename a window or
write over what stands above. Every print of this package goes through here: `say`, or `Terminal` for what rich draws.
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

_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, directions of writing, halves of pairs, line and paragraph breaks
_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # the last two join letters of Persian and parts of emoji


def visible(text: str) -> str:
    r"""The text with what a terminal would obey, but for line breaks and tabs, as escapes; idempotent.

    >>> visible("a\x1b[2Jb\r\n\u202e"), visible("naïve 中\u3000文")
    ('a\\x1b[2Jb\\r\n\\u202e', 'naïve 中\u3000文')
    """
    if text.isprintable():
        return text
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _OBEYED else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def say(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print a text to standard output, or to standard error, at once."""
    print(visible(text), end=end, file=sys.stderr if error else sys.stdout, flush=True)


class Terminal(Console):
    """rich's console; the text of whatever is printed is `visible`, and only what rich adds itself is obeyed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def guard_messages() -> None:
    """From here on, what Python and its logging print of this process is `visible` too: warnings, log records of any
    library, and tracebacks. For commands; once."""
    if sys.excepthook is _show_traceback:
        return
    sys.excepthook = _show_traceback
    written = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: visible(written(*args, **kwargs))
    made = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        new = made(*args, **kwargs)
        with suppress(Exception):  # arguments that do not fit their message, which logging reports itself
            new.msg, new.args = visible(new.getMessage()), None
        return new

    logging.setLogRecordFactory(record)


def _show_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, where)), error=True, end="")
