"""Stream, step, snapshot, journal, checkpoint."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from data.prefetch import prefetch
from train.config import TrainSpec
from train.distributed.deepspeed_engine import NonFiniteError, Policy, World
from train.dpo.draws import DrawRule
from train.dpo.objectives import Criterion
from train.dpo.reference import Reference
from train.dpo.step import BatchWithNoise, Models, prefetch_noise, step
from train.identity import TrainRun
from train.loader.loader import PairStream
from train.loader.sampler import Position
from train.models.flops import peak_flops
from train.trainer.checkpoint import (
    State,
    latest_valid,
    load_reference,
    load_state,
    save_checkpoint,
)
from train.trainer.metrics_log import MetricsLog, Stopwatch, Tally
from train.trainer.progress import StepProgress
from train.trainer.samples import Samples, save_sheet
from train.trainer.validation import NOT_LOOKED, Validation

PairLosses = list[tuple[tuple[str, ...], Tensor]]
"""Pair ids and losses of each micro-batch of a step."""

SCRATCH = ".universal"
"""Where shards are spread out when the number of processes has changed."""

READ_AHEAD = 4
"""Micro-batches kept ready."""


def learning_rate(spec: TrainSpec, done: int) -> float:
    """Of the optimizer step after `done` steps: linear warm-up, then constant."""
    return spec.lr * min(1.0, (done + 1) / spec.warmup) if spec.warmup else spec.lr


@dataclass(slots=True)
class Trainer:
    """A run in progress."""

    run: TrainRun
    world: World
    stream: PairStream
    models: Models
    policy: Policy
    reference: Reference
    rule: DrawRule
    criterion: Criterion
    console: Console
    step: int = 0
    """Optimizer steps done."""
    position: Position = field(default_factory=Position)
    refreshed: int = 0
    """The step of the last refresh."""
    checkpoint: Path | None = None
    """The last good one."""
    validation: Validation | None = None
    samples: Samples | None = None
    pair_flops: int = 0
    """Operations that a pair needs."""

    def resume(self) -> None:
        """Go on from the newest checkpoint whose hashes hold, if there is any."""
        first = self.world.rank == 0
        found = self.world.broadcast(_looked_up(self.run.folder) if first else None)
        if isinstance(found, ValueError):
            raise found
        folder, problems = found
        for problem in problems:
            self.console.print(f"[yellow]checkpoint left out:[/] {problem}")
        if folder is None:
            return
        state = load_state(folder)
        if state.world == self.world.size:
            self.policy.load(folder)
        else:
            self.console.print(f"written by {state.world} processes, now {self.world.size}")
            self.policy.load_from_other_ranks(folder, self.run.folder / SCRATCH)
        load_reference(folder, state, self.reference, self.world)
        self.step, self.position = state.step, state.position
        every = self.run.train.reference.every
        self.refreshed = state.step - state.step % every if state.reference_version else 0
        self.checkpoint = folder
        self.console.print(f"going on after step {self.step} from {folder}")

    def train(self) -> None:
        """Step until the configured number of optimizer steps is done."""
        spec = self.run.train
        journal = MetricsLog(self.run, self.world, self.console)
        journal.open_at(self.step)
        if self.step == 0:
            self.draw_samples(journal)
        batches = prefetch_noise(self.stream.batches(self.position), self.rule, self.world.device)
        depth = READ_AHEAD if spec.workers else 0
        with prefetch(batches, depth) as ready, StepProgress(
            self.step, spec.steps, self.console
        ) as progress:  # fmt: skip
            while self.step < spec.steps:
                line = self.optimizer_step(ready)
                self.after_step(line, journal)
                progress.advance(line)
        journal.close()

    def after_step(self, line: dict[str, Any], journal: MetricsLog) -> None:
        """What is done now and then; what others must not miss comes before the checkpoint."""
        spec, last = self.run.train, self.run.train.steps
        if self.reference.due(self.step):
            self.reference.refresh(self.policy)
            self.refreshed = self.step
        looked = self.validation is not None and self.validation.due(self.step, last)
        if self.validation is not None:
            line |= self.validation.look(self.policy, self.world) if looked else NOT_LOOKED
        if looked or self.step % spec.log_every == 0 or self.step == last:
            journal.write(line)
        if self.samples is not None and self.samples.due(self.step, last):
            self.draw_samples(journal)
        if self.step % spec.checkpoint_every == 0 or self.step == last:
            self.save()

    def draw_samples(self, journal: MetricsLog) -> None:
        """Draw the sheet of this step, if images are wanted."""
        if self.samples is None:
            return
        page = self.samples.draw(self.policy)
        if self.world.rank == 0:
            save_sheet(self.run.folder, self.step, page)
            journal.log_images("samples", page, self.step)

    def optimizer_step(self, ready: Iterator[BatchWithNoise]) -> dict[str, Any]:
        """One update of the policy from one global batch; the journal's line of it."""
        spec, watch, tally = self.run.train, Stopwatch(), Tally.empty(self.world.device)
        micro_batches = spec.batch // (spec.micro_batch * self.world.size)
        losses: PairLosses = []
        for index in range(micro_batches):
            wait = Stopwatch()
            noised = next(ready)
            waited_s = wait.lap()
            found = step(noised, self.models, self.criterion)
            self.policy.backward(found.loss)
            tally.add(found, waited_s)
            losses.append((noised.batch.pair_ids, found.losses))
            if index < micro_batches - 1:
                self.policy.next_micro_batch()
        means = tally.reduce(self.world)
        lr = learning_rate(spec, self.step)
        norm = self._update(means["loss"], lr, losses)
        pairs_per_s = spec.batch / watch.lap()
        line = {
            "step": self.step + 1,
            **means,
            "gradient_norm": norm,
            "lr": lr,
            "reference_version": self.reference.version,
            "steps_since_snapshot": self.step - self.refreshed,
            "epoch": self.position.epoch,
            "pairs_per_s": pairs_per_s,
            "mfu": self.utilization(pairs_per_s),
        }
        self.step, self.position = self.step + 1, self.stream.after(self.position)
        return line

    def utilization(self, pairs_per_s: float) -> float | None:
        """The share of what the GPUs could do that went into the model; None where unknown."""
        peak = peak_flops(self.world.device)
        return None if peak is None else self.pair_flops * pairs_per_s / (peak * self.world.size)

    def _update(self, loss: float, lr: float, losses: PairLosses) -> float:
        """The optimizer step, unless loss or gradient is not finite; the gradient's norm."""
        if not math.isfinite(loss):
            raise self._stopped(f"the loss is {loss}", losses)
        try:
            return self.policy.optimizer_step(lr)
        except NonFiniteError as error:
            raise self._stopped(str(error), losses) from error

    def _stopped(self, reason: str, losses: PairLosses) -> NonFiniteError:
        """Names the pairs whose loss is not finite; where all are finite, any may be the cause."""
        each = [
            (pair, value)
            for pair_ids, values in losses
            for pair, value in zip(pair_ids, values.tolist(), strict=True)
        ]
        guilty = [pair for pair, value in each if not math.isfinite(value)]
        everywhere = self.world.all_gather((guilty, [pair for pair, _ in each]))
        pairs = [pair for part in everywhere for pair in part[0]]
        pairs = pairs or [pair for part in everywhere for pair in part[1]]
        more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
        return NonFiniteError(
            f"step {self.step + 1} stopped before the optimizer step: {reason}. "
            f"Pairs: {', '.join(pairs[:5])}{more}. "
            f"Last good checkpoint: {self.checkpoint or 'none yet'}. "
            "Lower train.lr or train.beta, or look at these pairs"
        )

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        state = State(
            step=self.step,
            position=self.position,
            reference_version=self.reference.version,
            world=self.world.size,
        )
        keep = self.run.train.keep
        args = (self.run.folder, state, self.policy, self.reference, self.world, keep)
        self.checkpoint = save_checkpoint(*args)


def _looked_up(folder: Path) -> Any:
    """What rank 0 tells the others about checkpoints; an error travels as a value."""
    for left_over in (*folder.glob(".*.partial"), *folder.glob(SCRATCH)):
        shutil.rmtree(left_over)  # of a run that was killed
    try:
        return latest_valid(folder)
    except ValueError as error:
        return error
