"""The maths: PPO, advantages, the reward-KL frontier, calibration, and the batches that cross stages.

Knows torch, numpy and the settings of an estimator; knows no model, no rank and no file.
"""
