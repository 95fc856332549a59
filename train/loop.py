"""Stream, step, snapshot, journal, checkpoint."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data.pairs import PairSource, open_pairs
from train.adapter import attach, counts
from train.backbone import load_backbone
from train.checkpoint import State, last_good, load_reference, load_state, save_checkpoint
from train.choices import Criterion, make_criterion, timestep_rule
from train.config import Refresh, TrainRun, TrainSpec
from train.engine import NonFiniteError, Policy, World
from train.flops import forward_flops, pair_flops, peak_flops
from train.journal import Journal, Stopwatch, Tally
from train.latents import latents_of
from train.memory import count
from train.noise import DrawRule
from train.order import Position
from train.prefetch import ahead
from train.progress import StepProgress
from train.reference import Reference, make_reference
from train.samples import Samples, make_samples, save_sheet, texts
from train.step import Drawn, Networks, absent, drawn_ahead, step
from train.stream import DecidedPairs, PairStream, StreamPlan, decided_pairs
from train.validation import NOT_LOOKED, Validation, make_validation, split

PairLosses = list[tuple[tuple[str, ...], Tensor]]
"""Pair ids and losses of each micro-batch of a step."""

SCRATCH = ".universal"
"""Where shards are spread out when the number of processes has changed."""

READ_AHEAD = 4
"""Micro-batches kept ready."""


def learning_rate(spec: TrainSpec, done: int) -> float:
    """Of the optimizer step after `done` steps: linear warm-up, then constant."""
    return spec.lr * min(1.0, (done + 1) / spec.warmup) if spec.warmup else spec.lr


def open_stream(run: TrainRun, world: World) -> PairStream:
    """This rank's pairs; every mistake in the data that can be seen early is seen here."""
    if world.rank == 0:
        open_pairs(run.pairs)  # may draw the miniature's pairs
    world.barrier()
    source = open_pairs(run.pairs)
    plan = StreamPlan(
        seed=run.seed,
        batch=run.train.batch,
        micro_batch=run.train.micro_batch,
        window=run.train.window,
        side=run.model.resolution,
        rank=world.rank,
        world=world.size,
        workers=run.train.workers,
        memory_mb=run.train.memory_mb,
    )
    pairs = split(decided_pairs(run.labels, source), run.train.validation)
    return stream_of(run, pairs, source, plan)


def stream_of(
    run: TrainRun, pairs: DecidedPairs, source: PairSource, plan: StreamPlan
) -> PairStream:
    """Some of the pairs, from the pictures that the run trains on."""
    latents = None
    if run.latents:
        latents = latents_of(run.latents, pairs, mirrored=run.train.flip)
    return PairStream(pairs, source, plan, latents)


def held_out_stream(run: TrainRun, stream: PairStream) -> PairStream | None:
    """The pairs that are kept for validation, if any; to pick from, whatever their number."""
    if stream.pairs.held_out is None:
        return None
    alone = replace(stream.plan, batch=1, micro_batch=1, rank=0, world=1)
    return stream_of(run, stream.pairs.held_out, stream.source, alone)


@dataclass(slots=True)
class Trainer:
    """A run in progress."""

    run: TrainRun
    world: World
    stream: PairStream
    nets: Networks
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
        found = self.world.from_first(_looked_up(self.run.folder) if first else None)
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
        journal = Journal(self.run, self.world, self.console)
        journal.open_at(self.step)
        if self.step == 0:
            self.draw_samples(journal)
        batches = drawn_ahead(self.stream.batches(self.position), self.rule, self.world.device)
        depth = READ_AHEAD if spec.workers else 0
        with ahead(batches, depth) as ready, StepProgress(
            self.step, spec.steps, self.console
        ) as progress:  # fmt: skip
            while self.step < spec.steps:
                line = self.optimizer_step(ready)
                self.after_step(line, journal)
                progress.advance(line)
        journal.close()

    def after_step(self, line: dict[str, Any], journal: Journal) -> None:
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

    def draw_samples(self, journal: Journal) -> None:
        """Draw the sheet of this step, if pictures are wanted."""
        if self.samples is None:
            return
        page = self.samples.draw(self.policy)
        if self.world.rank == 0:
            save_sheet(self.run.folder, self.step, page)
            journal.picture("samples", page, self.step)

    def optimizer_step(self, ready: Iterator[Drawn]) -> dict[str, Any]:
        """One update of the policy from one global batch; the journal's line of it."""
        spec, watch, tally = self.run.train, Stopwatch(), Tally.empty(self.world.device)
        micro_batches = spec.batch // (spec.micro_batch * self.world.size)
        losses: PairLosses = []
        for index in range(micro_batches):
            wait = Stopwatch()
            drawn = next(ready)
            waited_s = wait.lap()
            found = step(drawn, self.nets, self.criterion)
            self.policy.backward(found.loss)
            tally.add(found, waited_s)
            losses.append((drawn.batch.pair_ids, found.losses))
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
            return self.policy.update(lr)
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
        everywhere = self.world.gather((guilty, [pair for pair, _ in each]))
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
        return last_good(folder)
    except ValueError as error:
        return error


def make_trainer(run: TrainRun, world: World, stream: PairStream, console: Console) -> Trainer:
    """Load the model and put policy and reference in their places."""
    spec = run.train
    with_vae = run.latents is None or spec.samples.every > 0
    backbone = load_backbone(run.model, spec.precision, world.device, with_vae=with_vae)
    unet = backbone.unet()
    num_timesteps = len(backbone.schedule.alphas_cumprod)
    criterion = make_criterion(spec, stream.pairs, num_timesteps)
    if spec.lora.rank:
        moving = spec.reference.refresh is not Refresh.frozen
        attach(unet, spec.lora, run.seed, moving=moving)
    memory = replace(count(counts(unet), spec, world.size), others=backbone.frozen_bytes)
    console.print(f"memory: {memory}")
    unet = arranged(unet, spec)
    rule = DrawRule(
        seed=run.seed,
        num_timesteps=num_timesteps,
        latent_shape=backbone.latent_shape,
        timesteps=timestep_rule(spec.timesteps),
        flip=spec.flip,
        caption_dropout=spec.caption_dropout,
    )
    held_out = held_out_stream(run, stream)
    validation = make_validation(spec.validation, held_out, stream.plan, backbone, unet, rule)
    told = texts(backbone, [""])
    forward = forward_flops(unet, backbone.latent_shape, told)
    policy = Policy(unet, spec, world)
    reference = make_reference(lambda: arranged(backbone.unet(), spec), policy, spec, world)
    asked = reference.denoiser if criterion.asks_reference else absent
    return Trainer(
        run,
        world,
        stream,
        Networks(backbone, policy, asked),
        policy,
        reference,
        rule,
        criterion,
        console,
        validation=validation,
        samples=make_samples(spec.samples, backbone, stream.pairs, run.seed),
        pair_flops=pair_flops(forward, asks_reference=criterion.asks_reference),
    )


def arranged(unet: Any, spec: TrainSpec) -> Any:
    """A UNet in the memory and execution that the settings ask for; its numbers stay."""
    if spec.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if spec.channels_last:  # activations only: DeepSpeed takes no weights in another order
        unet.register_forward_pre_hook(_to_channels_last)  # convolutions keep what they are given
    if spec.compile:
        unet.compile_repeated_blocks()
    return unet


def _to_channels_last(unet: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
