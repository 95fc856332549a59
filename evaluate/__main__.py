"""`python -m evaluate`: sample, score, compare, report. If interrupted, rerun it; it resumes."""

import sys

from conf.job import entry
from evaluate.run import expanded, main

if __name__ == "__main__":
    sys.argv[1:] = [expanded(argument) for argument in sys.argv[1:]]
    entry(main)()
