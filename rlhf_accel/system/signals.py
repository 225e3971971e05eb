"""What is asked of a run from outside, and what it tells while it goes: stop signals, and where each process is.

Knows the clock, signals and a log file; knows no model, and of other processes only what they posted.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

STOPPED = 143  # status of a run that was asked to stop and did: 128 + SIGTERM, as shells count
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
