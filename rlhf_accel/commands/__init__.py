"""The commands, one file each: `main` takes the options that `parsers` has parsed.

Knows all layers below; no layer below knows a command. Contains no maths of PPO and no collective.
"""
