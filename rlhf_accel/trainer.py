"""The former place of `PPOTrainer`, which scripts written before the package had folders import from here."""

from rlhf_accel.training.ppo_trainer import PPOTrainer

__all__ = ["PPOTrainer"]
