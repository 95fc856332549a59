"""Stage two: `python -m train`, or under torchrun. The same command resumes a run."""

from conf.job import entry
from train.run import exit_at_once, main

if __name__ == "__main__":
    with exit_at_once():
        entry(main)()
