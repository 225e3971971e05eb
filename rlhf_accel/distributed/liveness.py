"""Which phase of a run each process is in, and which process the others are waiting for when one hangs.

Processes tell each other through the key-value store of the process group, which works while a collective hangs. Knows
that store, the clock and a log file; knows no model and no collective's content.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rlhf_accel.system.terminal import say

_LONG = 60.0  # seconds after which a phase that has not ended is logged again

# Seconds between run.collective_timeout and the time limit of NCCL's process groups, at which its watchdog aborts
# the process before Python can report anything. A heartbeat reports at the former, late by up to `_LONG`.
BEFORE_ABORT = 120.0


def post(phase: str) -> None:
    """Publish the phase of this process, for `missing` on the others. Without a process group it does nothing."""
    _publish("post", phase)


@contextmanager
def waiting() -> Iterator[None]:
    """Mark this process as waiting inside a collective. The mark stays if the collective fails: others were missing."""
    _publish("waits", "1")
    yield
    _publish("waits", "")


def missing() -> dict[int, str]:
    """The last post of each process that is not waiting, by rank; empty if the store cannot be reached."""
    found = {}
    with suppress(RuntimeError, ValueError):
        for rank in range(torch.distributed.get_world_size()):
            phase, waits = (_published(f"rlhf_accel/{key}/{rank}") for key in ("post", "waits"))
            if phase and not waits:
                found[rank] = phase
    return found


def first_of_all(event: str) -> bool:
    """Whether this process is the first of the launch to ask for this event; True if the store cannot be reached."""
    try:
        return int(_store().add(f"rlhf_accel/{event}", 1)) == 1
    except (RuntimeError, ValueError):
        return True


def _publish(key: str, text: str) -> None:
    with suppress(RuntimeError, ValueError):  # no process group, or the process that serves the store has ended
        _store().set(f"rlhf_accel/{key}/{torch.distributed.get_rank()}", text)


def _published(key: str) -> str:
    return _store().get(key).decode() if _store().check([key]) else ""


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


class Heartbeat:
    """The current phase of this process: posted to the others, and logged when it begins and once a minute after that.

    Nothing is logged before `open`. A log that cannot be written is ignored. A phase that lasts `limit` seconds is also
    reported on standard error, once and by one process of the launch.
    """

    def __init__(
        self,
        post: Callable[[str], None] = post,
        missing: Callable[[], dict[int, str]] = missing,
        limit: float = math.inf,
    ) -> None:
        self.now = "start"
        self._limit = limit
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
        """Enter a phase, described in a few words."""
        self.now, self._since = phase, time.monotonic()
        self._post(f"{phase} since {_clock()}")
        self._log(phase)

    def seconds(self) -> float:
        """Seconds since this process entered its phase."""
        return time.monotonic() - self._since

    def _repeat(self) -> None:
        while not self._done.wait(_LONG):
            if self.seconds() >= _LONG:
                busy = ", ".join(f"rank {rank} in {phase}" for rank, phase in self._missing().items())
                self._log(f"{self.now}: still, for {self.seconds():.0f} s" + (f"; busy: {busy}" if busy else ""))
            if self.seconds() >= self._limit and first_of_all(f"late/{self.now}"):
                say(f"warning: {late(self, self._missing())}", error=True)

    def _log(self, text: str) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.parent.mkdir(exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"{_clock()} {text}\n")


def who_is_missing(rank: int, heartbeat: Heartbeat, missing: dict[int, str]) -> str:
    """A message for a lost process group: the phase of this process, and the ranks that did not come."""
    others = _named({other: phase for other, phase in missing.items() if other != rank})
    return f"rank {rank} lost contact after {heartbeat.seconds():.0f} s in {heartbeat.now}; missing: {others}"


def late(heartbeat: Heartbeat, missing: dict[int, str]) -> str:
    """A message for a phase that lasts longer than run.collective_timeout, before NCCL may end the process."""
    return (
        f"{heartbeat.now} has lasted {heartbeat.seconds():.0f} s, longer than run.collective_timeout; not waiting for "
        f"other ranks: {_named(missing)}. If one of them hangs or is gone, NCCL now ends the run with its own message"
    )


def _named(phases: dict[int, str]) -> str:
    named = ", ".join(f"rank {rank} (in {phase})" for rank, phase in phases.items())
    return named or "unknown, see the last line of each logs/rank-*.log"


def share_time_limit() -> None:
    """Give each process group the time limit of the first. DeepSpeed makes groups with torch's default, which is 10
    minutes for NCCL and 30 for gloo."""
    c10d = torch.distributed.distributed_c10d
    first = c10d._get_default_group()
    device = first._device_types[0]
    limit = first._get_backend(device).options._timeout
    for group in c10d._world.pg_map:
        if group is not first:
            c10d._set_pg_timeout(limit, group)


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed: torch raises a plain RuntimeError for most failures of gloo."""
    text = str(error).lower()
    words = ("timed out", "timeout", "connection closed", "connection reset", "nccl", "gloo", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _clock() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
