"""Aspect buckets against squares: `python -m benchmarks.buckets`; one JSON object on the last line.

Both train on the same images of several aspects, from the pair files, step by step in turns. What
is compared is the processor time of a step, over all threads, since wall time means little where
others use the cores; buckets have a little less area than the square, so it is divided by the
pixels.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.train import machine, ours
from benchmarks.worlds import WORLDS, model_folder, training_run, write_labels, write_pairs
from data.images import Size
from data.storage.prefetch import prefetch
from train.config import BucketKind, BucketSpec
from train.distributed.world import World, start, stop
from train.dpo.step import prefetch_noise
from train.loader.order import Position
from train.trainer.build import make_trainer, open_stream
from train.trainer.trainer import Trainer

ASPECTS = ((1, 1), (3, 2), (2, 3), (5, 4), (4, 5), (16, 9))
"""Of the images, as many pairs of each."""


def shapes(side: int) -> list[Size]:
    """Sizes of about side x side pixels with these aspects."""
    return [Size(round(side * (w / h) ** 0.5), round(side * (h / w) ** 0.5)) for w, h in ASPECTS]


def trainers(name: str, root: Path, batch: int, step: int, here: World) -> dict[str, Trainer]:
    """A trainer on squares and one on buckets, of the same pairs."""
    world, at = WORLDS[name], root / name
    model_folder(world, root)
    write_pairs(at / "pairs", shapes(world.image), 8 * batch)
    write_labels(at / "labels", at / "pairs")
    specs = {
        "squares": BucketSpec(),
        "buckets": BucketSpec(kind=BucketKind.free, step=step, unit=batch),
    }
    both: dict[str, Trainer] = {}
    for who, spec in specs.items():
        run = training_run(world, root, batch=batch, micro_batch=batch, stage=2, buckets=spec)
        both[who] = make_trainer(run, here, open_stream(run, here), Console(quiet=True))
    return both


def measure(both: dict[str, Trainer], steps: int, here: World) -> dict[str, Any]:
    """Processor seconds of steps in turns, and pixels a second of buckets over those of squares."""
    seconds: dict[str, list[float]] = {who: [] for who in both}
    with ExitStack() as stack:
        contenders = {}
        for who, trainer in both.items():
            batches = trainer.stream.batches(Position())
            noised = prefetch_noise(batches, trainer.draw_rule, here.device)
            ready = stack.enter_context(prefetch(noised, 0))  # else the other's would be counted
            contenders[who] = ours(trainer, ready)
        for turn in range(steps + 3):  # the first ones meet new shapes
            for who, run in contenders.items():
                began = time.process_time()
                run()
                if turn >= 3:
                    seconds[who].append(time.process_time() - began)
    area = both["buckets"].stream.relative_area
    middle = {who: statistics.median(values) for who, values in seconds.items()}
    return {
        "cpu_s_a_step": middle,
        "relative_area": area,
        "pixels_ratio": middle["squares"] / middle["buckets"] * area,
        "steps": seconds,
    }


def main() -> None:
    """Measure, and leave the figures on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="miniature", choices=sorted(WORLDS))
    parser.add_argument("--batch", type=int, default=16, help="pairs a step, all of one size")
    parser.add_argument("--step", type=int, default=16, help="pixels of train.buckets.step")
    parser.add_argument("--steps", type=int, default=12, help="steps of each that are counted")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="bench-buckets-") as folder:
        here = start("cpu")
        torch.manual_seed(0)
        both = trainers(given.world, Path(folder), given.batch, given.step, here)
        result = measure(both, given.steps, here)
        stop()
    print(
        f"pixels a second of buckets over those of squares: {result['pixels_ratio']:.3f} "
        f"(area {result['relative_area']:.3f} of the square's)"
    )
    print(json.dumps(result | {"plan": vars(given), "machine": machine()}))


if __name__ == "__main__":
    main()
