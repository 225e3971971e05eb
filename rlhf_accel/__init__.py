"""PPO from human feedback on Accelerate and peft."""

__version__ = "0.1.0"
