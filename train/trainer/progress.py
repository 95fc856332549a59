"""Shows the progress of training: a bar in a terminal, a line now and then in a log."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.trainer.trainer import Callback, Trainer

LINE_EVERY_S = 15.0


class ShowProgress(Callback):
    """Shows steps done, loss, accuracy and time left; the console is silent except on rank 0."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def before_training(self, trainer: Trainer) -> None:
        """Start the bar and the clock."""
        self.first, self.total = trainer.state.step, trainer.run.train.steps
        self.started = self.last_line = time.monotonic()
        self.task = self.bar.add_task("train", total=self.total, completed=self.first, numbers="")
        self.bar.start()

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Show a step."""
        numbers = f"loss {line['loss']:.4f} · accuracy {line['accuracy']:.2f}"
        if trainer.run.train.is_beta_auto:
            numbers += f" · factor {line['gradient_factor']:.2f} · beta {line['beta']:.0f}"
        self.bar.update(self.task, completed=line["step"], numbers=numbers)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            self._print(line, numbers, now - self.started)

    def _print(self, line: Mapping[str, Any], numbers: str, passed_s: float) -> None:
        step = line["step"]
        left_s = passed_s / (step - self.first) * (self.total - step)
        self.console.print(
            f"step {step}/{self.total} · {numbers} · "
            f"{line['pairs_per_s']:.1f} pairs/s · {left_s / 60:.0f} min left"
        )

    def close(self, *, failed: bool) -> None:
        """Remove the live display."""
        self.bar.stop()
