"""Every choice of a run: the keys (`schema`, `reward_schema`), their contradictions (`rules`), and how YAML and the
command line become a config (`loading`).

Knows no tensor, no model and no rank: an error in a config is found before any of them is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_accel.system.lazy import lazy

if TYPE_CHECKING:
    from rlhf_accel.config.loading import load
    from rlhf_accel.config.reward_schema import RewardTrainingConfig
    from rlhf_accel.config.schema import Config
    from rlhf_accel.system.errors import ConfigError, RunFailed

__all__ = ["Config", "ConfigError", "RewardTrainingConfig", "RunFailed", "load"]

# On first use: `--help` of most commands needs no schema, whose classes take pydantic a while to build.
__getattr__ = lazy(
    __name__,
    {
        "Config": "rlhf_accel.config.schema",
        "ConfigError": "rlhf_accel.system.errors",
        "RewardTrainingConfig": "rlhf_accel.config.reward_schema",
        "RunFailed": "rlhf_accel.system.errors",
        "load": "rlhf_accel.config.loading",
    },
)
