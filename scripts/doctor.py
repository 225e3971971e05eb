"""Check a run before it starts: python scripts/doctor.py [--config RECIPE_OR_FILE] [--section.key value ...]"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
