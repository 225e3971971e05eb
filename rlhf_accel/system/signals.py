"""What is asked of a run from outside, and what it tells while it goes: stop signals, and where each process is.

Knows the clock, signals and a log file; knows no model, and of other processes only what they posted.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOPPED = 143  # status of a run that was asked to stop and did: 128 + SIGTERM, as shells count
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_STILL = 60.0  # seconds between notes that a phase goes on


class StopRequest:
    """SIGTERM, or SIGUSR1 with which Slurm warns, while the block lasts: noted, and at the second the process leaves.

    Also where the main thread waits for other processes and runs no handler: a thread reads what Python's own handler
    writes for each signal. Outside the main thread no signal can be caught, and none is.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._woken_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            threading.Thread(target=self._count, args=(self._read,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._woken_before)
            os.close(self._write)  # at which the thread ends

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _count(self, read: int) -> None:
        count = 0
        while numbers := os.read(read, 64):
            for name in (signal.Signals(number).name for number in numbers if number in SIGNALS):
                count += 1
                # Written as it is: the interrupted code may be printing.
                if count > 1:
                    _tell(f"{name} again: leaving at once")
                    os._exit(STOPPED)
                _tell(f"{name}: finishing this phase, then saving and leaving; once more leaves at once")
        os.close(read)


def _tell(text: str) -> None:
    with suppress(OSError):  # a console may be gone, and signals are counted on
        os.write(2, f"{text}\n".encode())


class Heartbeat:
    """Which phase of which step this process is in: a line in its log for each, and one a minute while a phase lasts.

    `post` tells the other processes, and `missing` says which of them wait for nobody, so that a log of one that hangs
    names them. Nothing is logged before `open`; a log that cannot be written stays behind.
    """

    def __init__(
        self, post: Callable[[str], None] = lambda _: None, missing: Callable[[], dict[int, str]] = dict
    ) -> None:
        self.now = "start"
        self._post = post
        self._missing = missing
        self._since = time.monotonic()
        self._path: Path | None = None
        self._done = threading.Event()

    def open(self, path: Path) -> None:
        self._path = path
        threading.Thread(target=self._repeat, daemon=True, name="heartbeat").start()

    def close(self) -> None:
        self._done.set()

    def __call__(self, phase: str) -> None:
        """This process enters a phase, described in a few words."""
        self.now, self._since = phase, time.monotonic()
        self._post(f"{phase} since {_clock()}")
        self._log(phase)

    def seconds(self) -> float:
        """Since this process entered its phase."""
        return time.monotonic() - self._since

    def _repeat(self) -> None:
        while not self._done.wait(_STILL):
            if self.seconds() >= _STILL:
                busy = ", ".join(f"rank {rank} in {said}" for rank, said in self._missing().items())
                self._log(f"{self.now}: still, for {self.seconds():.0f} s" + (f"; busy: {busy}" if busy else ""))

    def _log(self, text: str) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.parent.mkdir(exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"{_clock()} {text}\n")


def who_is_missing(rank: int, heartbeat: Heartbeat, missing: dict[int, str]) -> str:
    """What this process was doing when others left it waiting, and which they are by what they posted."""
    others = ", ".join(f"rank {other} (in {said})" for other, said in missing.items() if other != rank)
    return (
        f"rank {rank} lost contact after {heartbeat.seconds():.0f} s in {heartbeat.now}; missing: "
        f"{others or 'unknown, logs/rank-*.log say where each was'}"
    )


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed: torch raises a plain RuntimeError for most of what gloo reports."""
    text = str(error).lower()
    words = ("timed out", "timeout", "connection closed", "connection reset", "nccl", "gloo", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _clock() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
