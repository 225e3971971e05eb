"""This process among others: ranks, collectives, data parallelism and ZeRO, portable checkpoints, trackers.

The only importer of accelerate and deepspeed. Knows no PPO, no text and no reward.
"""
