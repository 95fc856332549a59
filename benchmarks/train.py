"""How fast stage two is: `make bench-train`. A table, and one JSON object on the last line.

Everything is measured in turns, block by block, and medians are compared, so that a machine that is
busy meanwhile slows all alike.

- `ours` is `Trainer.optimizer_step` on label shards and pair files, with the thread that reads
  ahead: all that training does between two checkpoints. With `latents ready` it reads the latents
  that stage one wrote, else it decodes the images and encodes them; with `and texts`, for models
  with a T5, it reads the encoded prompts as well.
- `floor` cannot be avoided: policy forward and backward, reference forward and the fused AdamW
  step, in the same library on tensors that are ready, without DeepSpeed.
- `diffusers` is the step of its Diffusion-DPO example, see `peer.py`, in a process of its own.
"""

import argparse
import json
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import options
from benchmarks.memory import peak_by_stage
from benchmarks.peer import example
from benchmarks.race import race, ratio
from benchmarks.worlds import WORLDS, training_run, write_latents, write_texts, write_world
from data.storage.prefetch import prefetch
from train.config import ActivationCheckpointing
from train.distributed.world import World, start, stop
from train.dpo.loss import denoising_errors, dpo_losses
from train.dpo.step import BatchWithNoise, NoisedBatch, predict, prefetch_noise, prepare_inputs
from train.identity import TrainRun
from train.loader.loader import PairStream
from train.loader.order import Position
from train.models.components import Denoiser, ModelComponents
from train.models.flops import peak_flops
from train.trainer.build import make_trainer, open_stream, stream_of
from train.trainer.trainer import READ_AHEAD, Trainer

CONTENDERS = OURS, CACHED, TEXTS, FLOOR, DIFFUSERS = (
    "ours", "ours, latents ready", "ours, and texts", "floor", "diffusers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and for how long."""

    world: str
    batch: int
    """Pairs a step, in one micro-batch."""
    steps: int
    """Optimizer steps of a block."""
    blocks: int
    pairs: int = 64
    rivals: tuple[str, ...] = (FLOOR, DIFFUSERS)
    """What ours is compared with: nothing where it does not fit beside ours, not the example where
    it cannot train the model, and encoded prompts where encoding them takes long."""
    spec: tuple[tuple[str, Any], ...] = ()
    """Further settings of the training."""


ON_CPU = (
    Plan(world="reduced", batch=8, steps=1, blocks=7, pairs=32),
    Plan(world="miniature", batch=32, steps=2, blocks=7),
    Plan(world="reduced_sd3", batch=2, steps=1, blocks=5, pairs=16, rivals=(TEXTS, FLOOR)),
    Plan(world="reduced_flux", batch=2, steps=1, blocks=5, pairs=16, rivals=(TEXTS, FLOOR)),
)
ON_GPU = (
    Plan(world="sd15", batch=8, steps=10, blocks=5, pairs=256),
    Plan(world="sdxl", batch=4, steps=6, blocks=3, rivals=(),
         spec=(("gradient_checkpointing", ActivationCheckpointing.full),)),
)  # fmt: skip
QUICK = (
    Plan(world="quick", batch=4, steps=1, blocks=1, pairs=8),
    Plan(world="quick_xl", batch=4, steps=1, blocks=1, pairs=8, rivals=()),
    Plan(world="quick_flux", batch=4, steps=1, blocks=1, pairs=8, rivals=(TEXTS, FLOOR)),
)


# --- contenders ----------------------------------------------------------------------------------


def floor_step(
    components: ModelComponents,
    policy: nn.Module,
    reference: Denoiser,
    questions: Sequence[NoisedBatch],
    beta: float,
    every: int = 1,
) -> Callable[[], None]:
    """The bare pass of a micro-batch, on questions that are ready; AdamW after `every` of them."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-8, weight_decay=0.01, fused=True)
    turn = count()

    def run() -> None:
        number = next(turn)
        inputs = questions[number % len(questions)]
        errors = denoising_errors(predict(policy, inputs, components), inputs.target)
        with torch.inference_mode():
            predicted = predict(reference, inputs, components)
        others = denoising_errors(predicted.clone(), inputs.target)
        dpo_losses(errors, others, beta).mean().backward()  # type: ignore[no-untyped-call]
        if (number + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
            if components.device.type == "cuda":
                torch.cuda.synchronize()

    return run


def ours(trainer: Trainer, ready: Iterator[BatchWithNoise]) -> Callable[[], None]:
    """A whole step of the trainer."""

    def run() -> None:
        trainer.optimizer_step(ready)

    return run


# --- measuring -----------------------------------------------------------------------------------


def measure(plan: Plan, root: Path, here: World) -> dict[str, Any]:
    """All contenders on one model."""
    world = WORLDS[plan.world]
    base, pairs = write_world(world, root, plan.pairs)
    run = training_run(
        world, root, batch=plan.batch, micro_batch=plan.batch, stage=2, **dict(plan.spec)
    )
    trainer = make_trainer(run, here, open_stream(run, here), Console(quiet=True))
    latents, images = replace(run, latents=write_latents(world, root)), trainer.stream
    with ExitStack() as stack:

        def read(stream: PairStream) -> Iterator[BatchWithNoise]:
            batches = stream.batches(Position())
            noised = prefetch_noise(batches, trainer.draw_rule, here.device, stream.texts)
            return stack.enter_context(prefetch(noised, READ_AHEAD))

        def cached(run: TrainRun) -> PairStream:
            return stream_of(run, images.pairs, images.source, images.plan)

        ready = read(images)
        contenders: dict[str, Callable[[], Any]] = {
            OURS: ours(trainer, ready),
            CACHED: ours(trainer, read(cached(latents))),
        }
        if TEXTS in plan.rivals:
            texts = replace(latents, texts=write_texts(world, root))
            contenders[TEXTS] = ours(trainer, read(cached(texts)))
        if FLOOR in plan.rivals:
            components = trainer.models.components
            questions = [prepare_inputs(next(ready).on(here.device), components) for _ in range(4)]
            reference = trainer.models.reference
            contenders[FLOOR] = floor_step(
                components, components.denoiser(), reference, questions, run.train.first_beta
            )
        if DIFFUSERS in plan.rivals:
            file = pairs / "train-0.parquet"
            theirs = example(base, file, world.resolution, plan.batch, here.device)
            contenders[DIFFUSERS] = stack.enter_context(theirs).step
        speeds = race(contenders, blocks=plan.blocks, steps=plan.steps, pairs=plan.batch)
    return figures(speeds, trainer, plan)


def figures(speeds: dict[str, list[float]], trainer: Trainer, plan: Plan) -> dict[str, Any]:
    """Medians, and medians of the blocks' ratios; goals are 0.95 for the floor and 1.3 (CPU)."""

    def over(one: str, two: str) -> float | None:
        return ratio(speeds[one], speeds[two]) if two in speeds else None

    best = TEXTS if TEXTS in speeds else CACHED
    speed = statistics.median(speeds[best])
    peak = peak_flops(trainer.world.device)
    return {
        "plan": asdict(plan),
        "pairs_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "floor_ratio": over(best, FLOOR),
        "floor_ratio_with_text_encoders": over(CACHED, FLOOR),
        "text_encoders_fraction": 1 - ratio(speeds[CACHED], speeds[best]),
        "floor_ratio_from_images": over(OURS, FLOOR),
        "diffusers_ratio": over(CACHED, DIFFUSERS),
        "diffusers_ratio_from_images": over(OURS, DIFFUSERS),
        "gflop_a_pair": trainer.pair_flops / 1e9,
        "gflops": trainer.pair_flops * speed / 1e9,
        "mfu": trainer.pair_flops * speed / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if peak else None,
        "blocks": speeds,
    }


# --- telling -------------------------------------------------------------------------------------


def show(results: dict[str, dict[str, Any]], memory: dict[str, dict[str, float]]) -> None:
    """The tables."""
    console = Console(width=120)
    table = Table("model", *CONTENDERS, "of floor", "times diffusers", "text encoders")
    for name, result in results.items():
        speeds = [_digits(result["pairs_per_s"].get(who)) for who in CONTENDERS]
        ratios = (
            f"{_digits(result[key])} ({_digits(result[key + '_from_images'])})"
            for key in ("floor_ratio", "diffusers_ratio")
        )
        texts = TEXTS in result["pairs_per_s"]
        cost = f"{result['text_encoders_fraction']:.1%} of a step" if texts else "–"
        table.add_row(name, *speeds, *ratios, cost)
    console.print(
        table, "pairs/s; ratios with latents (and texts) ready, in brackets from images; what text "
        "encoders cost without texts"
    )  # fmt: skip
    peaks = Table("ZeRO stage", "peak MiB a rank", "of it the model's")
    for stage, peak in memory.items():
        peaks.add_row(stage, f"{peak['peak_mib']:.0f}", f"{peak['own_mib']:.0f}")
    console.print(peaks, "two ranks, bf16, one pair each")


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def machine() -> dict[str, Any]:
    """Where this was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def chosen(parsed: argparse.Namespace) -> list[Plan]:
    """What is to be measured here."""
    plans = QUICK if parsed.quick else ON_GPU if torch.cuda.is_available() else ON_CPU
    some = [plan for plan in plans if parsed.worlds is None or plan.world in parsed.worlds]
    if not some:
        raise SystemExit(f"--worlds {parsed.worlds}; here are {[plan.world for plan in plans]}")
    return [replace(plan, blocks=parsed.blocks or plan.blocks) for plan in some]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny models, to see that it runs")
    add("--out", type=Path, help="file for the JSON object")
    add("--blocks", type=int, help="instead of each plan's own number")
    add("--worlds", nargs="+", help="some of the models only")
    add(
        "--options",
        nargs="*",
        help="what settings bring to the first model; those with these words",
    )
    add("--stages", default="0,1,2,3", help="whose memory; empty for none")
    return parser.parse_args()


def main() -> None:
    """Measure, tell, and leave the figures on the last line."""
    parsed = arguments()
    warnings.filterwarnings("ignore")
    stages = [int(stage) for stage in parsed.stages.split(",") if stage]
    plans, effects = chosen(parsed), dict[str, Any]()
    first = plans[0]
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        root = Path(folder)
        memory = peak_by_stage(first.world, root, stages)
        here = start("auto")
        results = {plan.world: measure(plan, root, here) for plan in plans}
        if parsed.options is not None:
            some = options.with_words(parsed.options)
            effects = options.effects(
                first.world, root, here, some, batch=first.batch, blocks=first.blocks
            )
        stop()
    show(results, memory)
    if effects:
        options.show(effects)
    result = results[first.world]
    report = {"pairs_per_s": result["pairs_per_s"].get(TEXTS, result["pairs_per_s"][CACHED])}
    report |= {key: result[key] for key in ("floor_ratio", "diffusers_ratio")}
    report |= {"peak_memory_by_stage": memory, "worlds": results, "options": effects}
    report |= {"machine": machine()}
    if parsed.out:
        parsed.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
