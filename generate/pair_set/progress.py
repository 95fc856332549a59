"""How many images all processes have generated, as the first of them shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from generate.pair_set.plan import PairPlan

LOOK_S = 1.0
"""Seconds between two looks at which files are there."""
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


class ImageCount:
    """Counts the images that are done, whoever generated them; looks no more at finished blocks."""

    def __init__(self, plan: PairPlan) -> None:
        self._plan = plan
        self._unfinished = list(range(plan.num_blocks))
        self.total = plan.num_images

    def done(self) -> int:
        """Images of finished files, and those that wait in the folders of the others."""
        plan = self._plan
        unfinished = [block for block in self._unfinished if not plan.shard(block).exists()]
        self._unfinished = unfinished
        sizes = {block: len(plan.prompts_of(block)) * plan.spec.images for block in unfinished}
        waiting = sum(min(size, plan.num_done(block)) for block, size in sizes.items())
        return self.total - sum(sizes.values()) + waiting


@contextmanager
def progress_bar(plan: PairPlan, console: Console | None) -> Iterator[None]:
    """A bar over all images, whoever generates them, during the block; none without a console."""
    if console is None:
        yield
        return
    count, stop = ImageCount(plan), Event()
    with Progress(*BARS, console=console) as progress:
        task = progress.add_task("generating images", total=count.total, completed=count.done())

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
