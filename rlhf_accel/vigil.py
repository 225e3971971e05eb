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

    Outside the main thread no signal can be caught, and none is.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        # Written as it is: the interrupted code may be printing.
        if self.received is not None:
            os.write(2, f"{name} again: leaving at once\n".encode())
            os._exit(STOPPED)
        self.received = name
        os.write(2, f"{name}: finishing this phase, then saving and leaving; once more leaves at once\n".encode())


class Heartbeat:
    """Which phase of which step this process is in: a line in its log for each, and one a minute while a phase lasts.

    `post` tells the other processes. Nothing is logged before `open`; a log that cannot be written stays behind.
    """

    def __init__(self, post: Callable[[str], None] = lambda _: None) -> None:
        self.now = "start"
        self._post = post
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
                self._log(f"{self.now}: still, for {self.seconds():.0f} s")

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
