"""Train a reward model: python scripts/train_reward.py [--config FILE] [--section.key value ...]"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["train-reward", *sys.argv[1:]])
