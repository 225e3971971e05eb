"""Continue prompts with a trained model: python scripts/generate.py RUN_OR_MODEL [PROMPT ...] [--compare]"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
