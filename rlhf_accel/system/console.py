"""A console that may fail: the disk of the log is full, the reader of a pipe has exited, an encoding lacks a character.

A run continues without its console; a command that prints its result there ends with one line. Knows streams; knows
nothing about the text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rlhf_accel.system.errors import RunFailed, why


class Stream:
    """A text stream that discards everything after its first failure.

    Characters that its encoding lacks are written as `?`. While `strict`, the failure also raises `RunFailed`. `find`
    returns the current stream, or None if the process was started without one.
    """

    def __init__(self, find: Callable[[], Any], *, strict: bool = False) -> None:
        self._find = find
        self.strict = strict
        self.given_up = False

    def write(self, text: str) -> int:
        self._try(lambda stream: _write(stream, text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def put(self, stream: Any) -> None:
        """Write to this stream from now on."""
        self._find = lambda: stream

    def isatty(self) -> bool:
        with suppress(AttributeError, ValueError):
            return bool(self._find().isatty())
        return False

    @property
    def encoding(self) -> str:
        return getattr(self._find(), "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)

    def _try(self, work: Callable[[Any], None]) -> None:
        if self.given_up:
            return
        try:
            stream = self._find()
            if stream is None:
                raise OSError("the process has none")
            work(stream)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.given_up = True
            _to_nowhere(stream)
            if self.strict:
                raise RunFailed(f"standard output cannot be written ({why(error)})") from error


def _write(stream: Any, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding))


def _to_nowhere(stream: Any) -> None:
    """Redirect the stream's buffer, which Python writes at exit, to the null device: otherwise the exit status would be
    120, whatever the command did."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def standard_output() -> Any:
    """The current sys.stdout, or the stream below it while a progress bar of rich has replaced sys.stdout."""
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)


@contextmanager
def guarded() -> Iterator[None]:
    """Make both standard streams a `Stream`: standard error is never strict, standard output until `may_fail`."""
    _open_standard_files()
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(lambda: out, strict=True), Stream(lambda: err)
    try:
        yield
    finally:
        may_fail()
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, err


def may_fail() -> None:
    """From here on standard output may fail: the command's result is not what it prints."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.strict = False


def _open_standard_files() -> None:
    """Make sure that the file descriptors 0, 1 and 2 are open: otherwise the next opened file, such as metrics.jsonl,
    gets one of them and receives what libraries write to their console."""
    with suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)
