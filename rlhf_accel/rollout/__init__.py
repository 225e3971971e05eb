"""Prompts to rollouts: sampling, scoring, and the forward passes of policy, critic and reference.

Knows models and rewards; knows no loss, no optimizer and no file.
"""
