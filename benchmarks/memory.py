"""Peak memory of training under each ZeRO stage on two ranks; started by `benchmarks.train`."""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.flow_shapes import FLOW_SHAPES
from benchmarks.worlds import WORLDS, training_run, write_texts, write_world
from train.config import Precision
from train.distributed.world import start, stop
from train.dpo.step import prefetch_noise
from train.loader.order import Position
from train.trainer.build import make_trainer, open_stream

RANKS = 2
STEPS = 3


def peak_by_stage(world: str, root: Path, stages: Sequence[int]) -> dict[str, dict[str, float]]:
    """MiB of the larger rank, by stage: at its peak, and how much of it came with the model.

    With fewer GPUs than ranks there is nothing to measure.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < RANKS:
        return {}
    own = root / "memory"  # another pair set than the speed is measured on
    if stages:
        write_world(WORLDS[world], own, pairs=16)
        if world in FLOW_SHAPES:
            write_texts(WORLDS[world], own)
    return {str(stage): _in_ranks(world, own, stage) for stage in stages}


def arguments(world: str, root: Path, stage: int) -> list[str]:
    """The command line of `main`."""
    return [world, str(root), str(stage)]


def _in_ranks(world: str, root: Path, stage: int) -> dict[str, float]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    program = ["-m", "benchmarks.memory", *arguments(world, root, stage)]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *program], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"stage {stage} on {RANKS} ranks failed:\n{done.stderr[-4000:]}")
    return read_peaks(done.stdout)


def read_peaks(output: str) -> dict[str, float]:
    """What the first rank prints last."""
    peaks: dict[str, float] = json.loads(output.splitlines()[-1])
    return peaks


def used_mib(device: torch.device, *, peak: bool) -> float:
    """Memory of this process: on the GPU where there is one, else resident in RAM."""
    if device.type == "cuda":
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return read(device) / 2**20
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


def reset_peak(device: torch.device) -> None:
    """Forget a GPU's peak so far; that of RAM cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def main() -> None:
    """One rank: a few steps, and how high the memory went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("world")
    parser.add_argument("root", type=Path)
    parser.add_argument("stage", type=int)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    here = start("auto")
    run = training_run(
        WORLDS[given.world], given.root, batch=RANKS, micro_batch=1, stage=given.stage,
        precision=Precision.bf16,
    )  # fmt: skip
    if given.world in FLOW_SHAPES:
        run = replace(run, texts=write_texts(WORLDS[given.world], given.root))
    stream = open_stream(run, here)
    before = used_mib(here.device, peak=False)
    trainer = make_trainer(run, here, stream, Console(quiet=True))
    pairs = stream.batches(Position())
    batches = prefetch_noise(pairs, trainer.draw_rule, here.device, stream.texts)
    for _ in range(STEPS):
        trainer.optimizer_step(batches)
    trainer.reference.refresh(trainer.policy)
    peak = used_mib(here.device, peak=True)
    peaks = here.all_gather((peak, peak - before))
    if here.rank == 0:
        print(json.dumps({"peak_mib": max(peaks)[0], "own_mib": max(own for _, own in peaks)}))
    here.barrier()
    stop()


if __name__ == "__main__":
    main()
