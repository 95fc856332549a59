"""What people see while a run trains: a bar in a terminal, a line now and then in a log."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 15.0


class StepProgress:
    """Steps done, loss, accuracy and time left; silent on every rank but the first."""

    def __init__(self, done: int, total: int, console: Console) -> None:
        self.total, self.done, self.first = total, done, done
        self.console = console
        self.began = self.last_line = time.monotonic()
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, numbers="")

    def __enter__(self) -> "StepProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, line: Mapping[str, Any]) -> None:
        """Show a step."""
        self.done = line["step"]
        numbers = f"loss {line['loss']:.4f} · accuracy {line['accuracy']:.2f}"
        self.bar.update(self.task, completed=self.done, numbers=numbers)
        now = time.monotonic()
        if self.console.is_terminal or now - self.last_line < LINE_EVERY_S:
            return
        self.last_line = now
        left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
        self.console.print(
            f"step {self.done}/{self.total} · {numbers} · "
            f"{line['pairs_per_s']:.1f} pairs/s · {left / 60:.0f} min left"
        )
