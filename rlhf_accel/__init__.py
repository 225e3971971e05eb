"""PPO from human feedback on Accelerate, DeepSpeed and peft.

`PPOTrainer(load(Config, "run.yaml")).fit()` trains; `RewardTrainer` makes a reward model of ratings or preferences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_accel.system.lazy import lazy
from rlhf_accel.system.version import __version__

if TYPE_CHECKING:
    from rlhf_accel.config import Config, RewardTrainingConfig, load
    from rlhf_accel.training.ppo_trainer import PPOTrainer
    from rlhf_accel.training.reward_trainer import RewardTrainer

__all__ = ["__version__", "Config", "PPOTrainer", "RewardTrainer", "RewardTrainingConfig", "load"]

# At first use: torch, transformers and peft take seconds to import, which `--help` need not wait for.
__getattr__ = lazy(
    __name__,
    {
        "Config": "rlhf_accel.config",
        "RewardTrainingConfig": "rlhf_accel.config",
        "load": "rlhf_accel.config",
        "PPOTrainer": "rlhf_accel.training.ppo_trainer",
        "RewardTrainer": "rlhf_accel.training.reward_trainer",
    },
)


def __dir__() -> list[str]:
    return list(__all__)
