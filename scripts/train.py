"""PPO from human feedback: accelerate launch scripts/train.py [--config RECIPE_OR_FILE] [--section.key value ...]"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
