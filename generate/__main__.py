"""`python -m generate`: images of prompts as a pair set, for `pairs=own`."""

from conf.job import entry
from generate.run import main

if __name__ == "__main__":
    entry(main)()
