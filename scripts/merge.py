"""A trained adapter and its base as one full model: python scripts/merge.py RUN_OR_ADAPTER OUTPUT"""

import sys

from rlhf_accel.__main__ import merge, run

if __name__ == "__main__":
    run(merge, sys.argv[1:])
