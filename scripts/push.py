"""A run's model to the hub: python scripts/push.py RUN USER/NAME"""

import sys

from rlhf_accel.__main__ import push, run

if __name__ == "__main__":
    run(push, sys.argv[1:])
