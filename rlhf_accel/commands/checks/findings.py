"""The result of checks: one line each, ok, a warning or a problem with the key to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_accel.reward import RewardError
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.system.terminal import say

Level = Literal["ok", "warning", "problem"]
Verdict = tuple[Level, str]  # of one check, with its message


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check; `check` is its name."""

    level: Level
    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:8}{self.check}: {self.message}"


class Findings:
    """The findings so far. `printer` is called with each line as soon as it is found."""

    def __init__(self, printer: Callable[[str], None] = say) -> None:
        self.printer = printer
        self._found: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found)

    def note(self, level: Level, check: str, message: str) -> None:
        """Add a finding, unless its message is there already."""
        finding = Finding(level=level, check=check, message=" ".join(message.split()))
        if not any(finding.message == other.message for other in self._found):
            self._found.append(finding)
            self.printer(str(finding))

    @property
    def healthy(self) -> bool:
        """Whether nothing is a problem; warnings do not count."""
        return not any(finding.level == "problem" for finding in self._found)

    @contextlib.contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """An error that the block raises is a problem of this check, and the other checks continue."""
        try:
            yield
        except (ConfigError, RewardError, RunFailed) as error:
            self.note("problem", check, str(error))
        except Exception as error:  # a check examines something unknown, whose errors are findings
            self.note("problem", check, f"{type(error).__name__}: {error}")

    def check(self, name: str, look: Callable[..., Verdict], *args: Any) -> None:
        with self.checking(name):
            level, message = look(*args)
            self.note(level, name, message)
