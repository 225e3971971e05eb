"""PPO from human feedback on Accelerate, DeepSpeed and peft."""

__version__ = "0.1.0"
