"""Stop signals: SIGTERM, and SIGUSR1, which Slurm can send before it kills a job.

Knows signals and standard error; knows no run and no other process.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

STOPPED = 143  # exit status of a run that a signal stopped: 128 + SIGTERM, as in shells
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which the first stop signal is noted in `received`, and a second one ends the process at once.

    This works even while the main thread waits for other processes and cannot run a handler: a thread reads the bytes
    that Python's own handler writes for each signal. Outside the main thread it does nothing, since Python allows no
    handlers there.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._handlers: dict[int, Any] = {}  # to be restored

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
            threading.Thread(target=self._count, args=(self._read,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_fd)
            os.close(self._write)  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _count(self, read: int) -> None:
        count = 0
        while numbers := os.read(read, 64):
            for name in (signal.Signals(number).name for number in numbers if number in SIGNALS):
                count += 1
                if count > 1:
                    _print(f"{name} again: exiting at once")
                    os._exit(STOPPED)
                _print(f"{name}: finishing this phase, then saving and exiting; a second signal exits at once")
        os.close(read)


def _print(text: str) -> None:
    # Not through sys.stderr, which the interrupted code may be using.
    with suppress(OSError):  # without a console, signals still count
        os.write(2, f"{text}\n".encode())
