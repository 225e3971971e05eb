"""PPO from human feedback: accelerate launch scripts/train.py [--config RECIPE_OR_FILE] [--section.key value ...]"""

import sys

from rlhf_accel.__main__ import run, train

if __name__ == "__main__":
    run(train, sys.argv[1:])
