"""Code and addresses in a run's config that need the user's own flag before a command uses them.

A folder from elsewhere is data. A command that reads one does not call functions that only its config names, does not
run code that comes with its models, and sends nothing to an address that only its config names. Functions of this
package are trusted.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_accel.system.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_accel.config.schema import Config

FLAG = "--trust_code"
_KEYS = ("reward.function", "reward.gold", "reward.url", "model.trust_remote_code")


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        FLAG,
        action="store_true",
        help="call the reward functions and the reward server that the run's config names, and run code that comes "
        "with its models if the config has model.trust_remote_code; only for folders that you trust",
    )


def is_ours(target: str) -> bool:
    """Whether the target is a function of this package.

    >>> is_ours("rlhf_accel.reward:vader"), is_ours("rlhf_accelerate:f"), is_ours("rlhf_accel.reward:_private")
    (True, False, False)
    """
    module, _, name = target.partition(":")
    return module.startswith("rlhf_accel.") and not name.startswith("_")


def foreign_code(config: Config, keys: Collection[str] = _KEYS) -> list[str]:
    """Code and addresses that the config's `keys` would run or contact, each as `key=value`."""
    reward, model = config.reward, config.model
    named = [("reward.function", target) for target in reward.function]
    named += [("reward.gold", target) for target in reward.gold]
    found = [f"{key}={target}" for key, target in named if key in keys and not is_ours(target)]
    if reward.url is not None and "reward.url" in keys:
        found.append(f"reward.url={reward.url} (which receives the texts, and RLHF_ACCEL_REWARD_TOKEN if it is set)")
    if model.trust_remote_code and "model.trust_remote_code" in keys:
        names = dict.fromkeys(name for name in (model.name_or_path, reward.model) if name is not None)
        found.append(f"model.trust_remote_code=true (code that comes with {', '.join(names)})")
    return found


def require_trust(config: Config, place: Path, trusted: bool, keys: Collection[str] = _KEYS) -> None:
    """Raises `ConfigError` with the code and addresses, if there are any and the user has not given the flag."""
    found = [] if trusted else foreign_code(config, keys)
    if found:
        raise ConfigError(
            f"{place}: its config would run {'; '.join(found)}; nothing is run; add {FLAG} if you trust it",
            key=FLAG,
            runs=tuple(found),
        )
