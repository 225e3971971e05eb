"""Merge a trained adapter into its base: python scripts/merge.py RUN_OR_ADAPTER OUTPUT"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
