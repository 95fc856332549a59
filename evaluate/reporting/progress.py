"""How far a comparison is, over all ranks: the first shows it, and the others work as well."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from generate.image_files import Sample

LIST_EVERY_S = 5.0
"""Time between two listings of the images: a folder in a network may take a second to list."""


class SampledImages:
    """Counts the images that have a file, whichever rank sampled them, for a progress bar."""

    def __init__(
        self, images: Mapping[str, Sequence[Sample]], bar: Progress, every_s: float = LIST_EVERY_S
    ) -> None:
        self._names: dict[Path, set[str]] = {}
        for sample in (sample for of_model in images.values() for sample in of_model):
            self._names.setdefault(sample.path.parent, set()).add(sample.path.name)
        self._bar, self._every_s = bar, every_s
        self._listed_s, self._number = time.monotonic(), self.listed()
        total = sum(map(len, self._names.values()))
        self._task: TaskID = bar.add_task("sampling", total=total, completed=self._number)

    def listed(self) -> int:
        """How many of the images are on disk now."""
        number = 0
        for folder, names in self._names.items():
            with suppress(OSError):  # not there yet
                number += len(names.intersection(path.name for path in folder.iterdir()))
        return number

    def advance(self, number: int) -> None:
        """Count images that this rank has sampled, and now and then those of the others."""
        self._number += number
        if (now := time.monotonic()) - self._listed_s >= self._every_s:
            self._listed_s, self._number = now, self.listed()
        self._bar.update(self._task, completed=self._number)

    def finish(self) -> None:
        """Show how many there are in the end."""
        self._bar.update(self._task, completed=self.listed())


def progress(console: Console, *, shown: bool) -> Progress:
    """A progress bar with counts and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )
