"""The checks of `rlhf-accel doctor`, by topic: config, data, building the run, reward, model.

Each reports to `findings.Findings`. None writes a file or trains anything.
"""
