"""Checks at the borders of a run that cost seconds and are made in every run: what two ways must agree on is compared.

A probe is a pure function: models and texts in, a `Finding` out. Whoever calls it stops the run with the finding's
message, or prints it. Knows models and token ids; knows no config, no rank and no file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a probe found: `difference` is the largest one that it measured, in `unit`, `limit` the most that rounding
    explains, and `message` one line that names what was compared and, where it failed, the cause to look at."""

    probe: str
    difference: float
    limit: float
    unit: str
    message: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; one that is not a number is not."""
        return self.difference <= self.limit
