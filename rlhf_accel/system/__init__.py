"""This process and this machine: files, locks, signals, the console, settings of torch.

Knows nothing of training.
"""
