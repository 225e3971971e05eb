"""A reward model from human feedback: python scripts/train_reward.py [--config FILE] [--section.key value ...]"""

import sys

from rlhf_accel.__main__ import run, train_reward

if __name__ == "__main__":
    run(train_reward, sys.argv[1:])
