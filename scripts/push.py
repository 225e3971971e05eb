"""Upload a run's model to the hub: python scripts/push.py RUN USER/NAME"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]])
