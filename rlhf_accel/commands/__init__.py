"""One file for each command that looks at a run, or at a config before it runs.

Knows all below it; nothing below knows a command. No maths of PPO and no collective stands here.
"""
