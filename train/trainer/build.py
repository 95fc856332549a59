"""From settings to a trainer: the stream, the model, policy and reference in their places."""

from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data.pairs import open_pairs
from data.pairs.schema import PairSource
from train.config import Refresh, TrainSpec
from train.distributed.deepspeed_engine import Policy, World
from train.dpo.draws import DrawRule
from train.dpo.objectives import make_criterion, timestep_rule
from train.dpo.reference import make_reference
from train.dpo.step import Models, absent
from train.identity import TrainRun
from train.loader.dataset import DecidedPairs, decided_pairs
from train.loader.latent_source import latents_of
from train.loader.loader import PairStream, StreamPlan
from train.models.activation_checkpointing import checkpoint_activations
from train.models.components import load_components
from train.models.flops import forward_flops, pair_flops
from train.models.lora import attach, counts
from train.models.memory import estimate_memory
from train.trainer.samples import make_samples, texts
from train.trainer.trainer import Trainer
from train.trainer.validation import make_validation, split


def shared_out(run: TrainRun, world: int) -> TrainRun:
    """The run with no more pairs a forward pass than a process has of a batch."""
    if run.train.batch % world:
        return run  # the stream says so
    micro_batch = min(run.train.micro_batch, run.train.batch // world)
    return replace(run, train=replace(run.train, micro_batch=micro_batch))


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
    """Some of the pairs, from the images that the run trains on."""
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


def make_trainer(run: TrainRun, world: World, stream: PairStream, console: Console) -> Trainer:
    """Load the model and put policy and reference in their places."""
    spec = run.train
    with_vae = run.latents is None or spec.samples.every > 0
    components = load_components(run.model, spec.precision, world.device, with_vae=with_vae)
    unet = components.unet()
    num_timesteps = len(components.schedule.alphas_cumprod)
    criterion = make_criterion(spec, stream.pairs, num_timesteps)
    if spec.lora.rank:
        moving = spec.reference.refresh is not Refresh.frozen
        attach(unet, spec.lora, run.seed, moving=moving)
    memory = estimate_memory(counts(unet), spec, world.size)
    memory = replace(memory, others=components.frozen_bytes)
    console.print(f"memory: {memory}")
    unet = arranged(unet, spec)
    rule = DrawRule(
        seed=run.seed,
        num_timesteps=num_timesteps,
        latent_shape=components.latent_shape,
        timesteps=timestep_rule(spec.timesteps),
        flip=spec.flip,
        caption_dropout=spec.caption_dropout,
    )
    held_out = held_out_stream(run, stream)
    validation = make_validation(spec.validation, held_out, stream.plan, components, unet, rule)
    told = texts(components, [""])
    forward = forward_flops(unet, components.latent_shape, told)
    policy = Policy(unet, spec, world)
    reference = make_reference(lambda: arranged(components.unet(), spec), policy, spec, world)
    asked = reference.denoiser if criterion.asks_reference else absent
    return Trainer(
        run,
        world,
        stream,
        Models(components, policy, asked),
        policy,
        reference,
        rule,
        criterion,
        console,
        validation=validation,
        samples=make_samples(spec.samples, components, stream.pairs, run.seed),
        pair_flops=pair_flops(forward, asks_reference=criterion.asks_reference),
    )


def arranged(unet: Any, spec: TrainSpec) -> Any:
    """A UNet in the memory and execution that the settings ask for; its numbers stay."""
    checkpoint_activations(unet, spec.gradient_checkpointing)
    if spec.channels_last:  # activations only: DeepSpeed takes no weights in another order
        unet.register_forward_pre_hook(_to_channels_last)  # convolutions keep what they are given
    if spec.compile:
        unet.compile_repeated_blocks()
    return unet


def _to_channels_last(unet: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
