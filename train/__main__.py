"""Stage two: `python -m train`, or under torchrun. The same command resumes a run."""

from conf.job import entry
from train.run import main

if __name__ == "__main__":
    entry(main)()
