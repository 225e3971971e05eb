"""PPO and reward-model training: what a run is made of, the step, and what surrounds it.

Knows the layers below by their functions; knows no command line, no file format and no library of processes.
"""
