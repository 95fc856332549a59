"""Pairs a second of stage two on a published shape, its part of the peak, and its memory.

Each setting has a process of its own: DeepSpeed's engine is never freed within one. Latents are
ready, as the experiments have them, and micro-batches are accumulated as they are, since one
stage reduces gradients after each and another after the last.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks.activations import gib_a_pair
from benchmarks.memory import reset_peak, used_mib
from benchmarks.train import floor_step
from benchmarks.worlds import (
    WORLDS,
    World,
    random_latents,
    training_run,
    write_texts,
    write_world,
)
from data.storage.prefetch import prefetch
from train.config import ActivationCheckpointing, LoraSpec, TrainSpec
from train.distributed.world import World as Ranks
from train.distributed.world import start, stop
from train.dpo.step import BatchWithNoise, prefetch_noise, prepare_inputs
from train.identity import TrainRun
from train.loader.loader import PairStream
from train.loader.order import Position
from train.models.components import load_components
from train.models.flops import forward_flops, pair_flops, peak_flops
from train.models.lora import counts
from train.models.memory import GIB, estimate_memory
from train.trainer.build import draw_rule_of, make_trainer, open_stream
from train.trainer.trainer import READ_AHEAD


def measure(
    folder: Path,
    *,
    world: str,
    micro_batch: int,
    accumulation: int,
    steps: int,
    zero: int = 1,
    texts: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Time `steps` optimizer steps after a first one; `options` are further training settings.

    With `texts`, prompts are encoded beforehand, and no text encoder is loaded.
    """
    here = start("auto")
    run = run_of(folder, WORLDS[world], micro_batch, accumulation, zero, options or {})
    if texts:
        run = replace(run, texts=write_texts(WORLDS[world], folder))
    stream = open_stream(run, here)
    began = time.perf_counter()
    trainer = make_trainer(run, here, stream, Console(quiet=True))
    with batches_of(here, stream, trainer.draw_rule) as ready:
        first_s = seconds_of(lambda: trainer.optimizer_step(ready), here)
        built_s = time.perf_counter() - began
        reset_peak(here.device)
        seconds = [seconds_of(lambda: trainer.optimizer_step(ready), here) for _ in range(steps)]
    components = trainer.models.components
    memory = estimate_memory(counts(trainer.policy.module), run.train, here.world_size)
    counted = replace(memory, others=components.frozen_bytes)
    a_pair = gib_a_pair(world, run.train.gradient_checkpointing)
    figures = speed(here, run.train, seconds, trainer.pair_flops) | {
        "first_step_s": first_s,
        "built_s": built_s,
        "counted_parts": str(counted),
        "counted_activations_gib": a_pair and micro_batch * a_pair,
        "counted_gib": counted.total / GIB + micro_batch * (a_pair or 0.0),
    }
    stop()
    return {"rows": [row_of(figures)], **figures}


def floor(folder: Path, *, world: str, micro_batch: int, accumulation: int, steps: int) -> (
    dict[str, Any]
):  # fmt: skip
    """Time what cannot be avoided: bare passes and AdamW on inputs that lie ready."""
    here = start("auto")
    run = run_of(folder, WORLDS[world], micro_batch, accumulation, 1, {})
    stream = open_stream(run, here)
    components = load_components(run.model, run.train.precision, here.device, with_vae=False)
    with batches_of(here, stream, draw_rule_of(run, components)) as ready:
        taken = [next(ready).on(here.device) for _ in range(2)]
        inputs = [prepare_inputs(batch, components) for batch in taken]
    policy, reference = components.denoiser(), components.denoiser()
    step = floor_step(
        components, policy, reference, inputs, run.train.first_beta, every=accumulation
    )

    def whole_step() -> None:
        for _ in range(accumulation):
            step()

    whole_step()
    reset_peak(here.device)
    seconds = [seconds_of(whole_step, here) for _ in range(steps)]
    family, condition = components.base.family, components.condition_of_new([""])
    forward = forward_flops(policy, family, components.latent_shape(components.square), condition)
    figures = speed(here, run.train, seconds, pair_flops(forward, uses_reference=True))
    stop()
    return {"rows": [row_of(figures)], **figures}


def run_of(
    folder: Path,
    world: World,
    micro_batch: int,
    accumulation: int,
    zero: int,
    options: Mapping[str, Any],
) -> TrainRun:
    """A run on random latents; what it reads is written the first time."""
    batch = micro_batch * accumulation
    write_world(world, folder, pairs=batch)
    settings = dict[str, Any]({"channels_last": False}) | dict(options)
    if kind := settings.get("gradient_checkpointing"):
        settings["gradient_checkpointing"] = ActivationCheckpointing(kind)
    if rank := settings.pop("lora_rank", 0):
        settings["lora"] = LoraSpec(rank=rank)
    run = training_run(world, folder, batch=batch, micro_batch=micro_batch, stage=zero, **settings)
    return replace(run, latents=random_latents(world, folder))


@contextmanager
def batches_of(
    here: Ranks, stream: PairStream, draw_rule: Any
) -> Iterator[Iterator[BatchWithNoise]]:
    """Micro-batches with noise, read by a thread as in training."""
    batches = prefetch_noise(stream.batches(Position()), draw_rule, here.device, stream.texts)
    with prefetch(batches, READ_AHEAD) as ready:
        yield ready


def seconds_of(step: Callable[[], Any], here: Ranks) -> float:
    """How long a step takes, with all that it leaves to the device."""
    began = time.perf_counter()
    step()
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def speed(here: Ranks, spec: TrainSpec, seconds: list[float], flops: int) -> dict[str, Any]:
    """What the table and the JSON say of a training's speed and memory."""
    rate, peak = spec.batch / median(seconds), peak_flops(here.device)
    figures = {
        "pairs_per_s": rate,
        "gflop_a_pair": flops / 1e9,
        "mfu": rate * flops / peak if peak else None,
        "peak_gib": used_mib(here.device, peak=True) / 2**10,
        "step_s": seconds,
        "batch": spec.batch,
        "micro_batch": spec.micro_batch,
    }
    if here.device.type == "cuda":
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return figures


def row_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The row in the table."""
    accumulated = figures["batch"] // figures["micro_batch"]
    note = f"{accumulated} x {figures['micro_batch']} pairs"
    if "first_step_s" in figures:
        note += f"; first step {figures['first_step_s']:.1f} s"
    return {
        "rate": figures["pairs_per_s"],
        "unit": "pairs/s",
        "peak_fraction": figures["mfu"],
        "peak_gib": figures["peak_gib"],
        "counted_gib": figures.get("counted_gib"),
        "note": note,
    }
