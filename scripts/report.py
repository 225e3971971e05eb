"""The report page of one run or several: python scripts/report.py RUN... [--output FILE]"""

import sys

from rlhf_accel.__main__ import report, run

if __name__ == "__main__":
    run(report, sys.argv[1:])
