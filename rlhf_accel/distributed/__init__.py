"""Processes: the only importer of accelerate and deepspeed.

Knows ranks, collectives and sharding; knows no PPO, no text and no reward.
"""
