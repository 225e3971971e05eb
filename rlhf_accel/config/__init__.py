"""Every choice of a run: `schema` has the keys, `rules` what contradicts what, `loading` YAML and the command line.

Knows no tensor, no model and no rank: what is wrong with a config is found before any of them is touched.
"""

from rlhf_accel.config.loading import load
from rlhf_accel.config.schema import Config, RewardTrainingConfig
from rlhf_accel.system.errors import ConfigError, RunFailed

__all__ = ["Config", "ConfigError", "RewardTrainingConfig", "RunFailed", "load"]
