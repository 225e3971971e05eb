"""Every choice of a run: `schema` has the keys, `rules` their contradictions, `loading` YAML and the command line.

Knows no tensor, no model and no rank: an error in a config is found before any of them is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_accel.config.loading import load
    from rlhf_accel.config.schema import Config, RewardTrainingConfig
    from rlhf_accel.system.errors import ConfigError, RunFailed

__all__ = ["Config", "ConfigError", "RewardTrainingConfig", "RunFailed", "load"]

_HOMES = {
    "Config": "rlhf_accel.config.schema",
    "ConfigError": "rlhf_accel.system.errors",
    "RewardTrainingConfig": "rlhf_accel.config.schema",
    "RunFailed": "rlhf_accel.system.errors",
    "load": "rlhf_accel.config.loading",
}


def __getattr__(name: str) -> Any:
    # On first use: `--help` of most commands needs no schema, whose classes take pydantic a while to build.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
