"""PPO and reward-model training: the parts of a run, the step, and the run around it.

Knows the layers below by their functions; knows no command line, no file format and no library of processes.
"""
