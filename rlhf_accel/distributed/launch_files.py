"""The config files for Accelerate and DeepSpeed in the package, the same as those at the top of a checkout.

Knows names and paths. Knows no content: Accelerate reads the files.
"""

from __future__ import annotations

import os
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "launch"
_DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def launch_names() -> list[str]:
    return sorted(path.stem for path in (LAUNCH / "accelerate_configs").glob("*.yaml"))


def launch_file(name: str) -> Path:
    return LAUNCH / "accelerate_configs" / f"{name}.yaml"


def find_deepspeed_file() -> None:
    """Let this process find the DeepSpeed config of a launch file from any working folder.

    A launch file names it by a relative path, such as ds_configs/zero2.json, and `accelerate launch` passes this path
    on as it is. If no such file is in the working folder, the package's own is meant.
    """
    named = os.environ.get(_DEEPSPEED_FILE)
    if named and not Path(named).exists() and (LAUNCH / named).is_file():
        os.environ[_DEEPSPEED_FILE] = str(LAUNCH / named)
