"""Evaluate the models of a run: accelerate launch … scripts/evaluate.py RUN [--which …] [--frontier [N]]"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
