"""Continue prompts with a trained model: python scripts/generate.py RUN_OR_MODEL [PROMPT ...] [--compare]"""

import sys

from rlhf_accel.__main__ import generate, run

if __name__ == "__main__":
    run(generate, sys.argv[1:])
