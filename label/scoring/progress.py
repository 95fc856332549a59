"""How far all processes are together, as the first of them shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from label.scoring.claims import Claims
from label.scoring.score_sets import ScoreSets

LOOK_S = 1.0
"""Seconds between two looks at what is there."""
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@contextmanager
def bar(sets: ScoreSets, claims: Claims, console: Console | None) -> Iterator[None]:
    """A bar over all pairs, whoever scores them, while the block runs; none without a console."""
    if console is None:
        yield
        return
    look, stop = Look(sets, claims), Event()
    with Progress(*BARS, console=console) as progress:
        task = progress.add_task("scoring pairs", total=look.total, completed=look.done())

        def watch() -> None:
            while not stop.wait(LOOK_S):
                progress.update(task, completed=look.done())

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            progress.update(task, completed=look.done())


class Look:
    """Counts the pairs that are scored, from the files that are there and what claims say."""

    def __init__(self, sets: ScoreSets, claims: Claims) -> None:
        self._sets, self._claims = sets, claims
        self._open = {shard.index: shard for shard in sets.shards}
        self.total = sum(shard.rows for shard in sets.shards)

    def done(self) -> int:
        """Pairs of finished shards, and those read of shards in work."""
        self._open = {i: shard for i, shard in self._open.items() if self._sets.absent(shard)}
        reading = self._claims.rows()
        begun = sum(min(reading.get(i, 0), shard.rows) for i, shard in self._open.items())
        return self.total - sum(shard.rows for shard in self._open.values()) + begun
