"""Write the report of one run or of several."""

from __future__ import annotations

import argparse

from rlhf_accel.runs.report.page import write
from rlhf_accel.system import console
from rlhf_accel.system.terminal import say


def main(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for a folder that is not a run, or if matplotlib is missing."""
    console.may_fail()
    page, notes = write(options.runs, options.output)
    for note in notes:
        say(f"note: {note}")
    say(f"wrote {page} and {page.with_suffix('')}/*.png")
