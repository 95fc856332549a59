"""Decoding by threads, by processes, and by processes with pipes: `python -m benchmarks.decode`.

768-pixel JPEGs are made ready for the paper's panel (CLIP's and PickScore's crops, HPS's padding),
first alone, then in a scoring pass with networks: tiny ones, where decoding decides, and larger
ones, where the networks do. They take turns in the same program. The processes of stage one write
arrays into shared memory; those with pipes send them, as an executor does by itself. Prints figures
as they come and, on the last line, all of them as one JSON object.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import median
from typing import Any

from label.metrics.preprocessing import (
    ImageTransform,
    ResizeMode,
    process_images,
)
from label.scoring.decode_pool import DecodePool, Decoding

WORKERS = 2
CHUNK = 8
AHEAD = 8 * WORKERS
"""Chunks in flight, as in `label.scoring.decode_pool`."""
SIDE = 768
TRANSFORMS = (
    ImageTransform(ResizeMode.CROP_EVEN, 224),
    ImageTransform(ResizeMode.CROP, 224),
    ImageTransform(ResizeMode.PAD, 224),
)
"""Those of CLIP and the aesthetic head, of PickScore and of HPS."""

LARGER = {"width": 384, "layers": 6, "heads": 6, "patch": 32, "side": 224}
"""Three networks of this size take about as long as decoding, resizing and padding an image."""

Work = Sequence[tuple[bytes, Sequence[ImageTransform]]]


class PipePool:
    """What a scoring pass needs of `DecodePool`, whose processes send what they have prepared."""

    prefetch = AHEAD

    def __init__(self) -> None:
        self._executor = ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"))

    def __enter__(self) -> "PipePool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def submit(self, chunk: Work) -> Decoding:
        """Begin to prepare a chunk."""
        return Decoding(self._executor.submit(process_images, chunk))


Pool = DecodePool | PipePool


def make_pools() -> dict[str, Pool]:
    """Those that are compared."""
    return {
        "threads": DecodePool(WORKERS, most_threads=WORKERS),
        "processes": DecodePool(WORKERS, most_threads=0),
        "pipes": PipePool(),
    }


def cpu_s() -> float:
    """CPU seconds of this process and its workers."""
    ticks = 0
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def decode_alone(pool: Pool, images: Sequence[bytes]) -> None:
    """All images, as many in flight as stage one has."""
    waiting: deque[Decoding] = deque()
    for start in range(0, len(images), CHUNK):
        waiting.append(pool.submit([(one, TRANSFORMS) for one in images[start : start + CHUNK]]))
        if len(waiting) > pool.prefetch:
            waiting.popleft().wait()
    while waiting:
        waiting.popleft().wait()


def scoring(size: dict[str, int], folder: Path) -> Callable[[Pool, Sequence[bytes]], None]:
    """A pass of the paper's panel on networks of this size."""
    import torch

    from benchmarks import inputs
    from label.scoring.batching import Batch
    from label.scoring.panel import Panel
    from label.scoring.scoring_pass import Clock, ScoringPass

    torch.manual_seed(0)
    panel = Panel.load(inputs.panel(folder, size, size), torch.device("cpu"))

    def score(pool: Any, images: Sequence[bytes]) -> None:
        scoring_pass = ScoringPass(panel.metrics, pool, Batch(8, is_checked=False), Clock())
        for image in images:
            scoring_pass.add(image, "a prompt")
        scoring_pass.flush()

    return score


def compare(run: Callable[[Pool, Sequence[bytes]], None], images: Sequence[bytes], rounds: int) -> (
    dict[str, Any]
):  # fmt: skip
    """Images a second and CPU seconds an image of each, in turns; medians.

    Own CPU seconds are those of the process that has the networks.
    """
    rates: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    own: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        pools = make_pools()
        for pool in pools.values():
            stack.enter_context(pool)
        for pool in pools.values():  # processes start and import
            run(pool, images[: 4 * CHUNK])
        for _ in range(rounds):
            for name, pool in pools.items():
                start, cpu, own_cpu = time.perf_counter(), cpu_s(), time.process_time()
                run(pool, images)
                rates[name].append(len(images) / (time.perf_counter() - start))
                costs[name].append((cpu_s() - cpu) / len(images))
                own[name].append((time.process_time() - own_cpu) / len(images))
    turns = zip(rates["threads"], rates["processes"], strict=True)
    return {
        "images_per_s": {name: median(values) for name, values in rates.items()},
        "cpu_s_per_image": {name: median(values) for name, values in costs.items()},
        "own_cpu_s_per_image": {name: median(values) for name, values in own.items()},
        "threads_over_processes": median(threads / processes for threads, processes in turns),
    }


def main() -> None:
    """Measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=512)
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    from benchmarks import inputs

    images = [inputs.jpeg(number, SIDE) for number in range(given.images)]
    figures: dict[str, Any] = {"images": given.images, "workers": WORKERS}
    figures["load"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        for part, run in {
            "alone": decode_alone,
            "tiny_networks": scoring(inputs.TINY, Path(name, "tiny")),
            "larger_networks": scoring(LARGER, Path(name, "larger")),
        }.items():
            figures[part] = compare(run, images, given.rounds)
            print(part, figures[part], flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
