"""A progress bar over what all processes have written together, as the first of them shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOOK_S = 1.0
"""Seconds between two looks at which files are there."""
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@contextmanager
def progress_bar(
    description: str, total: int, done: Callable[[], int], console: Console | None
) -> Iterator[None]:
    """A bar up to `total` while the block runs; none without a console.

    `done` looks how many there are, whoever did them; a thread calls it every `LOOK_S`.
    """
    if console is None:
        yield
        return
    stop = Event()
    with Progress(*BARS, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done())

        def watch() -> None:
            while not stop.wait(LOOK_S):
                progress.update(task, completed=done())

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            progress.update(task, completed=done())
