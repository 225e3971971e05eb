"""The maths: PPO, advantages, the reward-KL frontier, calibration, and the batches that cross stages.

Knows torch and numpy only: no model, no rank, no file.
"""
