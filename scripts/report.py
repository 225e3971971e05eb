"""Write the report of one run or of several: python scripts/report.py RUN... [--output FILE]"""

import sys

from rlhf_accel.__main__ import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
