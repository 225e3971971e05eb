"""This process and this machine: files, locks, signals, the console, memory, settings of torch.

Knows nothing about training.
"""
