"""Print where a launch file of the package lies."""

from __future__ import annotations

import argparse

from rlhf_accel.distributed.launch_files import launch_file
from rlhf_accel.system.terminal import say


def main(options: argparse.Namespace) -> None:
    say(str(launch_file(options.name)))
