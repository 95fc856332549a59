"""How fast stage two is: `make bench-train`. A table, and one JSON object on the last line.

Everything is measured in turns, block by block, and medians are compared, so that a machine that is
busy meanwhile slows all alike.

- `ours` is `Trainer.optimizer_step` on label shards and pair files, with the thread that reads
  ahead: all that training does between two checkpoints. With `latents ready` the VAE answers from
  memory, as when stage one has cached them; pictures are still decoded.
- `floor` cannot be avoided: policy forward and backward, reference forward and the fused AdamW
  step, in the same library on tensors that are ready, without DeepSpeed.
- `diffusers` is the step of its Diffusion-DPO example, see `peer.py`.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.memory import peak_by_stage
from benchmarks.peer import Example
from benchmarks.worlds import WORLDS, training_run, write_world
from data.ahead import ahead
from train import engine
from train.build import make_trainer, open_stream
from train.flops import peak_flops
from train.loop import READ_AHEAD, Trainer
from train.loss import denoising_errors, dpo_losses
from train.order import Position
from train.step import Question, answer, ask, drawn_ahead

OURS, CACHED, FLOOR, DIFFUSERS = "ours", "ours, latents ready", "floor", "diffusers"


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


ON_CPU = (
    Plan(world="reduced", batch=2, steps=2, blocks=5, pairs=16),
    Plan(world="miniature", batch=32, steps=2, blocks=7),
)
ON_GPU = (Plan(world="sd15", batch=8, steps=10, blocks=5, pairs=256),)
QUICK = (Plan(world="quick", batch=4, steps=1, blocks=1, pairs=8),)


# --- contenders ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a posterior; what `Backbone` reads of diffusers' distribution."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a VAE's `encode` gives."""

    latent_dist: Moments


class RememberingVae:
    """A VAE that encodes each picture once; pictures are told apart by their sums."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.config, self.dtype = vae, vae.config, vae.dtype
        self.known: dict[float, tuple[Tensor, Tensor]] = {}

    def encode(self, signed: Tensor) -> Encoded:
        """The posterior of each picture."""
        keys = signed.double().sum((1, 2, 3)).tolist()
        for key, picture in zip(keys, signed, strict=True):
            if key not in self.known:
                found = self.vae.encode(picture[None]).latent_dist
                self.known[key] = found.mean, found.std
        mean, std = zip(*(self.known[key] for key in keys), strict=True)
        return Encoded(Moments(torch.cat(mean), torch.cat(std)))


def floor_step(trainer: Trainer, questions: list[Question], beta: float) -> Callable[[], None]:
    """The bare step, on questions that are ready."""
    backbone, device = trainer.nets.backbone, trainer.world.device
    policy, reference = backbone.unet(), trainer.nets.reference
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-8, weight_decay=0.01, fused=True)
    turn = iter(range(1 << 62))

    def run() -> None:
        asked = questions[next(turn) % len(questions)]
        errors = denoising_errors(answer(policy, asked, backbone.dtype), asked.target)
        with torch.inference_mode():
            predicted = answer(reference, asked, backbone.dtype)
        others = denoising_errors(predicted.clone(), asked.target)
        dpo_losses(errors, others, beta).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def ours(trainer: Trainer, ready: Any, vae: Any) -> Callable[[], None]:
    """A whole step of the trainer."""
    nets = replace(trainer.nets, backbone=replace(trainer.nets.backbone, vae=vae))

    def run() -> None:
        trainer.nets = nets
        trainer.optimizer_step(ready)

    return run


# --- measuring -----------------------------------------------------------------------------------


def race(contenders: dict[str, Callable[[], Any]], plan: Plan) -> dict[str, list[float]]:
    """Pairs a second of each contender, block by block; the blocks take turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(plan.blocks + 1):
        for name, run in contenders.items():
            warm_up = -(-plan.pairs // plan.batch) if name == CACHED and block == 0 else 0
            for _ in range(warm_up):
                run()
            time.sleep(0.5)  # the reading thread fills its queue and rests
            began = time.perf_counter()
            for _ in range(plan.steps):
                run()
            if block:  # the first one warms up
                found[name].append(plan.steps * plan.batch / (time.perf_counter() - began))
    return found


def measure(plan: Plan, root: Path, here: engine.World) -> dict[str, Any]:
    """All contenders on one model."""
    world = WORLDS[plan.world]
    base, pairs = write_world(world, root, plan.pairs)
    run = training_run(world, root, batch=plan.batch, micro_batch=plan.batch, stage=2)
    trainer = make_trainer(run, here, open_stream(run, here), Console(quiet=True))
    backbone = trainer.nets.backbone
    with ExitStack() as stack:
        batches = drawn_ahead(trainer.stream.batches(Position()), trainer.rule, here.device)
        ready = stack.enter_context(ahead(batches, READ_AHEAD))
        questions = [ask(next(ready).on(here.device), backbone) for _ in range(4)]
        example = Example(
            base, pairs / "train-0.parquet", world.resolution, plan.batch, here.device
        )
        found = race(
            {
                OURS: ours(trainer, ready, backbone.vae),
                FLOOR: floor_step(trainer, questions, run.train.beta),
                CACHED: ours(trainer, ready, RememberingVae(backbone.vae)),
                DIFFUSERS: example.step,
            },
            plan,
        )
    return figures(found, trainer, plan)


def figures(found: dict[str, list[float]], trainer: Trainer, plan: Plan) -> dict[str, Any]:
    """Medians, and medians of the blocks' ratios; goals are 0.95 for the floor and 1.3 (CPU)."""

    def ratio(one: str, two: str) -> float:
        return statistics.median(a / b for a, b in zip(found[one], found[two], strict=True))

    speed = statistics.median(found[CACHED])
    peak = peak_flops(trainer.world.device)
    return {
        "plan": asdict(plan),
        "pairs_per_s": {name: statistics.median(values) for name, values in found.items()},
        "floor_ratio": ratio(CACHED, FLOOR),
        "floor_ratio_from_pictures": ratio(OURS, FLOOR),
        "diffusers_ratio": ratio(CACHED, DIFFUSERS),
        "diffusers_ratio_from_pictures": ratio(OURS, DIFFUSERS),
        "gflop_a_pair": trainer.pair_flops / 1e9,
        "gflops": trainer.pair_flops * speed / 1e9,
        "mfu": trainer.pair_flops * speed / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if peak else None,
        "blocks": found,
    }


# --- telling -------------------------------------------------------------------------------------


def show(results: dict[str, dict[str, Any]], memory: dict[str, dict[str, float]]) -> None:
    """The tables."""
    console = Console(width=120)
    table = Table("model", *(OURS, CACHED, FLOOR, DIFFUSERS), "of floor", "times diffusers")
    for name, found in results.items():
        speeds = [f"{found['pairs_per_s'][who]:.2f}" for who in (OURS, CACHED, FLOOR, DIFFUSERS)]
        ratios = (
            f"{found[key]:.2f} ({found[key + '_from_pictures']:.2f})"
            for key in ("floor_ratio", "diffusers_ratio")
        )
        table.add_row(name, *speeds, *ratios)
    console.print(table, "pairs/s; ratios with latents ready, in brackets from pictures")
    peaks = Table("ZeRO stage", "peak MiB a rank", "of it the model's")
    for stage, found in memory.items():
        peaks.add_row(stage, f"{found['peak_mib']:.0f}", f"{found['own_mib']:.0f}")
    console.print(peaks, "two ranks, bf16, one pair each")


def machine() -> dict[str, Any]:
    """Where this was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def chosen(asked: argparse.Namespace) -> list[Plan]:
    """What is to be measured here."""
    plans = QUICK if asked.quick else ON_GPU if torch.cuda.is_available() else ON_CPU
    some = [plan for plan in plans if asked.worlds is None or plan.world in asked.worlds]
    if not some:
        raise SystemExit(f"--worlds {asked.worlds}; here are {[plan.world for plan in plans]}")
    return [replace(plan, blocks=asked.blocks or plan.blocks) for plan in some]


def main() -> None:
    """Measure, tell, and leave the figures on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    parser.add_argument("--blocks", type=int, help="instead of each plan's own number")
    parser.add_argument("--worlds", nargs="+", help="some of the models only")
    parser.add_argument("--stages", default="0,1,2,3", help="whose memory; empty for none")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    stages = [int(stage) for stage in asked.stages.split(",") if stage]
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        root = Path(folder)
        plans = chosen(asked)
        memory = peak_by_stage(plans[0].world, root, stages)
        here = engine.start("auto")
        results = {plan.world: measure(plan, root, here) for plan in plans}
        engine.stop()
    show(results, memory)
    first = results[plans[0].world]
    keys = ("floor_ratio", "diffusers_ratio")
    told = {"pairs_per_s": first["pairs_per_s"][CACHED]} | {key: first[key] for key in keys}
    told |= {"peak_memory_by_stage": memory, "worlds": results, "machine": machine()}
    if asked.out:
        asked.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
