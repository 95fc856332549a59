"""Stage one: `python -m label` scores what is missing, votes, and says what came of it."""

from conf.job import entry
from label.run import main

if __name__ == "__main__":
    entry(main)()
