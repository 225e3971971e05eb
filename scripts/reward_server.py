"""Serve a reward over HTTP: python scripts/reward_server.py --function my_rewards:brevity --port 8000"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["reward-server", *sys.argv[1:]])
