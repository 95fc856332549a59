"""Writes the metrics log: a JSON line for each logged step (journal.jsonl), and the trackers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from rich.console import Console

from data.artifacts.atomic import ShardError, write_bytes
from train.identity import TrainRun
from train.trainer.error_monitor import ErrorMonitor
from train.trainer.tally import BUCKETS
from train.trainer.trackers import Tracker, open_trackers
from train.trainer.trainer import Callback, Trainer
from train.trainer.validation import is_evaluated

NEEDED = ("step", "loss", "accuracy", "pairs_per_s", "data_wait_s")
"""Numbers that every line has."""


@dataclass(slots=True)
class MetricsLog(Callback):
    """Logs every `train.log_every` steps, the last step, and every step with a validation."""

    run: TrainRun
    is_first: bool
    """Whether this is rank 0; the others write nothing."""
    console: Console
    monitor: ErrorMonitor = field(default_factory=ErrorMonitor)
    trackers: list[Tracker] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The JSON lines."""
        return self.run.folder / "journal.jsonl"

    def before_training(self, trainer: Trainer) -> None:
        """Open the log. Lines after the resumed step are cut, so that each step is there once."""
        if not self.is_first:
            return
        step = trainer.state.step
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_bytes(self.path, text.encode())
        self.monitor.resume(kept)
        self.trackers = open_trackers(self.run, step)

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Write the step's line if it is to be logged."""
        spec, step = self.run.train, trainer.state.step
        if step % spec.log_every == 0 or step == spec.steps or is_evaluated(line):
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Add a step's line, and warn if both errors rise."""
        if not self.is_first:
            return
        rises = self.monitor.add(line)
        if warning := self.monitor.warning(rises):
            self.console.print(f"[yellow]step {line['step']}:[/] {warning}")
        line = line | rises
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.log(_flat(line), line["step"])

    def log_images(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Show an image beside the curves."""
        for tracker in self.trackers:
            tracker.log_images(name, pixels, step)

    def close(self, *, failed: bool) -> None:
        """Finish the trackers."""
        for tracker in self.trackers:
            tracker.close(failed=failed)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the log's lines in order; a last line torn by a crash is left out.

    Raises:
        ShardError: The log cannot be read, or another line is damaged; says which.
    """
    cure = "restore the file, or delete it to continue without what it says"
    try:
        texts = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error}); {cure}") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            damaged = not isinstance(line, dict) or not all(
                isinstance(line.get(name), int | float) for name in NEEDED
            )
        except (ValueError, RecursionError):
            damaged = True
        if not damaged:
            lines.append(line)
        elif number < len(texts):
            raise ShardError(f"{path}: line {number} of {len(texts)} is damaged; {cure}")
    return lines


def _flat(line: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in line.items() if isinstance(value, float | int)}
    buckets = {
        f"accuracy_at_{index}_of_{BUCKETS}_of_the_schedule": value
        for index, value in enumerate(line["accuracy_by_timestep"])
        if value is not None
    }
    return {f"train/{name}": float(value) for name, value in (numbers | buckets).items()}
