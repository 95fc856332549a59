"""How far all processes are together, as the first of them shows it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.pairs.schema import PairShard
from label.scoring.score_sets import ScoreSets

LOOK_S = 1.0
"""Seconds between two looks at which files are there."""
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


class PairCount:
    """Counts the pairs that are scored: those of finished files, and those this process has read.

    Unfinished shards of other processes count when their files are there.
    """

    def __init__(self, sets: ScoreSets) -> None:
        self._sets = sets
        self._unfinished = {shard.index: shard for shard in sets.shards}
        self._read: Counter[int] = Counter()
        self.total = sum(shard.rows for shard in sets.shards)

    def advance(self, shard: PairShard, rows: int) -> None:
        """Note that this process has read more pairs of a shard."""
        self._read[shard.index] += rows

    def done(self) -> int:
        """Pairs of finished shards, and those that this process has read of the others."""
        self._unfinished = {
            index: shard for index, shard in self._unfinished.items() if self._sets.absent(shard)
        }
        left = sum(
            shard.rows - min(self._read[index], shard.rows)
            for index, shard in self._unfinished.items()
        )
        return self.total - left


@contextmanager
def bar(count: PairCount, console: Console | None) -> Iterator[None]:
    """A bar over all pairs, whoever scores them, while the block runs; none without a console."""
    if console is None:
        yield
        return
    stop = Event()
    with Progress(*BARS, console=console) as progress:
        task = progress.add_task("scoring pairs", total=count.total, completed=count.done())

        def watch() -> None:
            while not stop.wait(LOOK_S):
                progress.update(task, completed=count.done())

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            progress.update(task, completed=count.done())
