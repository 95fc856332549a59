"""The training loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.storage.prefetch import prefetch
from train.config import LOGISTIC, LrSchedule, Objective, TrainSpec
from train.distributed.deepspeed_engine import NonFiniteError, Policy
from train.distributed.policy_average import PolicyAverage
from train.distributed.world import World
from train.dpo.auto_beta import AutoBeta, mean_factor
from train.dpo.draws import DrawRule
from train.dpo.objectives import Criterion
from train.dpo.reference import Reference
from train.dpo.step import BatchWithNoise, Models, prefetch_noise, step
from train.identity import TrainRun
from train.loader.loader import PairStream
from train.loader.order import Position
from train.models.flops import peak_flops
from train.trainer.tally import Stopwatch, Tally, quantiles

PairLosses = list[tuple[tuple[str, ...], Tensor]]
"""Pair ids and losses of each micro-batch of a step."""

READ_AHEAD = 4
"""Micro-batches kept ready."""


class Callback:
    """Something that happens now and then while training; this one does nothing.

    Every rank calls every callback, in the order of `Trainer.callbacks`: what a callback does may
    need all ranks, and may use what those before it did. `make_callbacks` says why in which order.
    """

    __slots__ = ()

    def before_training(self, trainer: "Trainer") -> None:
        """Called once before the first step, whether the run is new or resumed."""

    def after_step(self, trainer: "Trainer", line: dict[str, Any]) -> None:
        """Called after each optimizer step with the step's metrics; may add to `line`."""

    def close(self, *, failed: bool) -> None:
        """Called once at the end, also of a run that failed."""


@dataclass(slots=True)
class RunState:
    """Where a run stands."""

    beta: AutoBeta
    """That of the next step; under a fixed beta always the same."""
    step: int = 0
    """Optimizer steps done."""
    position: Position = field(default_factory=Position)
    """The next global batch."""
    last_refresh: int = 0
    """The step after which the reference was last refreshed."""
    checkpoint: Path | None = None
    """The last good one."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A run in progress."""

    run: TrainRun
    world: World
    stream: PairStream
    models: Models
    policy: Policy
    reference: Reference
    average: PolicyAverage | None
    """With `train.ema`."""
    draw_rule: DrawRule
    criterion: Callable[[float], Criterion]
    """The objective at a beta."""
    state: RunState
    pair_flops: int
    """Floating point operations that a pair needs."""
    callbacks: Sequence[Callback] = ()

    def train(self) -> None:
        """Step until the configured number of optimizer steps is done."""
        with self._callbacks_closed(), self._batches() as batches:
            while self.state.step < self.run.train.steps:
                line = self.optimizer_step(batches)
                for callback in self.callbacks:
                    callback.after_step(self, line)

    def optimizer_step(self, batches: Iterator[BatchWithNoise]) -> dict[str, Any]:
        """Update the policy on one global batch, and return the step's metrics."""
        spec, watch, tally = self.run.train, Stopwatch(), Tally.empty(self.world.device)
        losses: PairLosses = []
        criterion = self.criterion(self.state.beta.beta)
        num_micro_batches = spec.batch // (spec.micro_batch * self.world.world_size)
        for index in range(num_micro_batches):
            wait = Stopwatch()
            noised = next(batches)
            waited_s = wait.lap()
            output = step(noised, self.models, criterion)
            self.policy.backward(output.loss)
            tally.add(output, waited_s)
            losses.append((noised.batch.pair_ids, output.losses))
            if index < num_micro_batches - 1:
                self.policy.next_micro_batch()
        means = tally.reduce(self.world)
        lr = learning_rate(spec, self.state.step)
        norm = self._update(means["loss"], lr, losses)
        line = self._line(means, norm, lr, spec.batch / watch.lap())
        self.state.step += 1
        self.state.position = self.stream.after(self.state.position)
        return line

    @contextmanager
    def _callbacks_closed(self) -> Iterator[None]:
        """Start the callbacks, and close them after the block whatever happens."""
        failed = True
        try:
            for callback in self.callbacks:
                callback.before_training(self)
            yield
            failed = False
        finally:
            for callback in self.callbacks:
                callback.close(failed=failed)

    @contextmanager
    def _batches(self) -> Iterator[Iterator[BatchWithNoise]]:
        """This rank's batches from the present position on, read by a thread."""
        stream, device = self.stream, self.world.device
        pairs = stream.batches(self.state.position)
        batches = prefetch_noise(pairs, self.draw_rule, device, stream.texts)
        with prefetch(batches, READ_AHEAD if stream.plan.workers else 0) as ready:
            yield ready

    def _line(
        self, means: dict[str, Any], norm: float, lr: float, pairs_per_s: float
    ) -> dict[str, Any]:
        """The step's metrics, in the order of the metrics log."""
        state, kind = self.state, self.run.train.objective.kind
        margins, beta = means.pop("margins"), state.beta.beta
        return {
            "step": state.step + 1,
            **means,
            "beta": None if kind is Objective.mapo else beta,
            "gradient_factor": mean_factor(margins, beta) if kind in LOGISTIC else None,
            "margin_quantiles": quantiles(margins),
            "gradient_norm": norm,
            "lr": lr,
            "reference_version": self.reference.version,
            "steps_since_snapshot": state.step - state.last_refresh,
            "epoch": state.position.epoch,
            "pairs_per_s": pairs_per_s,
            "mfu": self.utilization(pairs_per_s),
        }

    def utilization(self, pairs_per_s: float) -> float | None:
        """The fraction of the GPUs' peak that went into the model; None if the peak is unknown."""
        peak = peak_flops(self.world.device)
        if peak is None:
            return None
        return self.pair_flops * pairs_per_s / (peak * self.world.world_size)

    def _update(self, loss: float, lr: float, losses: PairLosses) -> float:
        """Take the optimizer step unless loss or gradient is not finite; return the norm."""
        if not math.isfinite(loss):
            raise self._non_finite(f"the loss is {loss}", losses)
        try:
            return self.policy.optimizer_step(lr)
        except NonFiniteError as error:
            raise self._non_finite(str(error), losses) from error

    def _non_finite(self, reason: str, losses: PairLosses) -> NonFiniteError:
        """An error that names the pairs whose loss is not finite, or all if each one is."""
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
            f"step {self.state.step + 1} stopped before the optimizer step: {reason}. "
            f"Pairs: {', '.join(pairs[:5])}{more}. "
            f"Last good checkpoint: {self.state.checkpoint or 'none yet'}. "
            "Lower train.lr or train.beta, or look at these pairs"
        )


def learning_rate(spec: TrainSpec, done: int) -> float:
    """The rate of the optimizer step after `done` steps, a function of these alone.

    lr (done + 1) / warmup during the warm-up. Afterwards, x in [0, 1) being the fraction of the
    remaining steps that are done and f = `lr_end`: lr when constant; lr (1 - (1 - f) x) when
    linear; lr (f + (1 - f) (1 + cos(pi x)) / 2) with the cosine (Loshchilov and Hutter 2017, Eq. 5,
    without restarts).
    """
    if done < spec.warmup:
        return spec.lr * ((done + 1) / spec.warmup)
    if spec.lr_schedule is LrSchedule.constant:
        return spec.lr
    fallen = (done - spec.warmup) / (spec.steps - spec.warmup)
    if spec.lr_schedule is LrSchedule.cosine:
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return spec.lr * (1 - (1 - spec.lr_end) * fallen)
