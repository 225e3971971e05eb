"""The options that a script of DeepSpeed's own launcher has, put where `accelerate launch` would put them.

Knows the environment of both launchers; imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_accel.config.options import take_option
from rlhf_accel.distributed.launch_files import LAUNCH
from rlhf_accel.system.errors import ConfigError

_USE, _FILE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def take_launch_options(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--local_rank N`, which `deepspeed` gives to each process, and without `--deepspeed FILE`,
    by which a user names the DeepSpeed config there. Both become environment variables of this process.

    Raises `ConfigError` if there is no such file, if the process was not launched, or if the launch has named a file
    already.
    """
    rest = list(arguments)
    rank, file = take_option(rest, "local_rank", "N"), take_option(rest, "deepspeed", "FILE")
    if rank is not None:
        os.environ.setdefault("LOCAL_RANK", rank)
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's name for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if file is not None:
        _use_deepspeed(file)
    return rest


def _use_deepspeed(file: str) -> None:
    key = "--deepspeed"
    if not Path(file).is_file() and not (LAUNCH / file).is_file():
        raise ConfigError(f"{key} {file}: there is no such file; expected a DeepSpeed config (ds_configs/)", key=key)
    if "RANK" not in os.environ:
        raise ConfigError(
            f"{key} {file} needs a launch, also for one process: deepspeed --num_gpus 1 SCRIPT {key} {file}", key=key
        )
    if os.environ.get(_USE, "false").lower() == "true":
        named = os.environ.get(_FILE, "its own settings")
        raise ConfigError(f"{key} {file}: accelerate launch has named {named} already; keep one of them", key=key)
    os.environ |= {_USE: "true", _FILE: file}
    os.environ.setdefault("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false")  # as in accelerate_configs/
