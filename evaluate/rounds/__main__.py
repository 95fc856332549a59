"""`python -m evaluate.rounds`: generate, label, train, judge, and again from the new policy."""

import sys

from conf.job import entry
from evaluate.rounds.run import main

if __name__ == "__main__":
    typed = sys.argv[1:]
    entry(lambda job: main(job, typed))()
