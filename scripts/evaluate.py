"""A run's models on its held-out prompts: accelerate launch … scripts/evaluate.py RUN [--which …] [--frontier [N]]"""

import sys

from rlhf_accel.__main__ import evaluate, run

if __name__ == "__main__":
    run(evaluate, sys.argv[1:])
