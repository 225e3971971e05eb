"""A stopwatch for the phases of some work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Seconds by phase; a phase may be entered several times."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    entering: Callable[[str], None] = lambda _: None
    """Called with the name of a phase when it starts, but not where the phase before has the same name."""
    _phase: str = ""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase != self._phase:
            self._phase = phase
            self.entering(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self.started
