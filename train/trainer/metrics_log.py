"""What a step did: reduced over ranks, written as JSON lines and for TensorBoard.

The keys are those of every objective. `loss` is the objective's own, vote weights included. Under
`mapo`, which asks no reference, `margin` is the loser's error minus the winner's, `accuracy` the
share of pairs where that is above 0, and the reference's errors are null.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from torch import Tensor

from data.artifacts.atomic import write_bytes
from train.distributed.deepspeed_engine import World
from train.dpo.step import StepOutput
from train.identity import TrainRun
from train.trainer.error_monitor import ErrorMonitor
from train.trainer.trackers import Tracker, open_trackers

BUCKETS = 5
"""Parts of the noise schedule for which accuracy is told apart."""

MEANS = ("loss", "accuracy", "margin", "policy_winner_error", "policy_loser_error",
         "reference_winner_error", "reference_loser_error")  # fmt: skip
OF_REFERENCE = MEANS[-2:]
"""NaN inside, and null in the journal, where the objective asks no reference."""


@dataclass(slots=True)
class Tally:
    """Sums over the pairs of one optimizer step, in float64 on the device: one sync a step."""

    sums: Tensor
    """Of MEANS; then accuracy by bucket; pairs by bucket."""
    pairs: int = 0
    waited_s: float = 0.0
    """Spent waiting for data."""

    @classmethod
    def empty(cls, device: torch.device) -> "Tally":
        """Of no pairs."""
        return cls(torch.zeros(len(MEANS) + 2 * BUCKETS, dtype=torch.float64, device=device))

    def add(self, found: StepOutput, waited_s: float) -> None:
        """Count the pairs of a micro-batch."""
        right = (found.margin > 0).double() + 0.5 * (found.margin == 0)  # a tie is half right
        means = [found.losses, right, found.margin, found.policy.winner, found.policy.loser,
                 found.reference.winner, found.reference.loser]  # fmt: skip
        bucket = (found.timestep * BUCKETS).long().clamp(max=BUCKETS - 1)
        by_bucket = self.sums.new_zeros(2, BUCKETS)
        by_bucket[0].index_add_(0, bucket, right)
        by_bucket[1].index_add_(0, bucket, torch.ones_like(right))
        sums = torch.stack([mean.double().sum() for mean in means])
        self.sums += torch.cat([sums, by_bucket.flatten()])
        self.pairs += len(right)
        self.waited_s += waited_s

    def reduce(self, world: World) -> dict[str, Any]:
        """The means over the global batch, equal on all ranks."""
        of_host = self.sums.new_tensor([self.pairs, self.waited_s])
        total = world.all_reduce(torch.cat([self.sums, of_host])).tolist()  # the host waits here
        means, buckets, (pairs, waited) = total[:7], total[7:-2], total[-2:]
        right, counts = buckets[:BUCKETS], buckets[BUCKETS:]
        return {
            **{
                name: None if name in OF_REFERENCE and math.isnan(value) else value / pairs
                for name, value in zip(MEANS, means, strict=True)
            },
            "accuracy_by_timestep": [
                r / n if n else None for r, n in zip(right, counts, strict=True)
            ],
            "data_wait_s": waited / world.size,
        }


@dataclass(slots=True)
class MetricsLog:
    """The run's diary on rank 0; elsewhere it writes nothing."""

    run: TrainRun
    world: World
    console: Console
    monitor: ErrorMonitor = field(default_factory=ErrorMonitor)
    trackers: list[Tracker] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The JSON lines."""
        return self.run.folder / "journal.jsonl"

    def open_at(self, step: int) -> None:
        """Begin, or go on after a step: later lines are cut, so each step stands there once."""
        if self.world.rank:
            return
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_bytes(self.path, text.encode())
        self.monitor.go_on(kept)
        self.trackers = open_trackers(self.run, step)

    def write(self, line: dict[str, Any]) -> None:
        """Add a step's line, and say when both errors rise."""
        if self.world.rank:
            return
        found = self.monitor.add(line)
        if words := self.monitor.warning(found):
            self.console.print(f"[yellow]step {line['step']}:[/] {words}")
        line = line | found
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.log(_flat(line), line["step"])

    def log_images(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Show an image beside the curves."""
        for tracker in self.trackers:
            tracker.log_images(name, pixels, step)

    def close(self) -> None:
        """Finish the files."""
        for tracker in self.trackers:
            tracker.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's lines in order; a last line torn by a crash is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _flat(line: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in line.items() if isinstance(value, float | int)}
    buckets = {
        f"accuracy_at_{index}_of_{BUCKETS}_of_the_schedule": value
        for index, value in enumerate(line["accuracy_by_timestep"])
        if value is not None
    }
    return {f"train/{name}": float(value) for name, value in (numbers | buckets).items()}


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed
