"""Train a policy with PPO."""

from __future__ import annotations

from rlhf_accel.config.schema import Config
from rlhf_accel.system import console
from rlhf_accel.training.ppo_trainer import PPOTrainer


def main(config: Config) -> None:
    console.may_fail()
    PPOTrainer(config).fit()
