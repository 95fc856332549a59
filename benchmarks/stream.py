"""How fast stage two reads: `make bench-stream`. A table, and one JSON object on the last line.

Images of 768 pixels against their latents (512 pixels, fp16, mean: 32 KiB an image), each beside
what cannot be avoided: decoding the same bytes on as many threads, and reading the same files.
Everything is measured in turns and medians are compared, so that a busy machine slows all alike.
Then: what is held in memory while the shards grow tenfold, what it costs to resume late in an epoch
of a million pairs, and how many row groups several ranks read together.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from data.artifacts.latents import KIND, GroupWriter, LatentFormat, LatentSet
from data.artifacts.manifest import Manifest, describe, part_name
from data.artifacts.parquet_io import write_table
from data.images import Size, decode, encode_jpeg, fit_square
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairShard, PairSource
from train.loader.dataset import DecidedPairs
from train.loader.image_source import Images, RowGroup
from train.loader.latent_source import latents_of
from train.loader.loader import PairStream, StreamPlan
from train.loader.order import Position, deal, epoch_order

SIDE, PIXELS, GROUP = 512, 768, 64
SIZES = (Size(SIDE, SIDE),)
FORM = LatentFormat(
    vae="0" * 64, size=SIDE, shape=(4, 64, 64), dtype="fp16", moments=False, flip=False,
    compute="fp32",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """Pair files, their latents, and labels by which image 0 wins."""

    source: PairSource
    pairs: DecidedPairs
    latents: LatentSet

    def stream(self, *, latents: bool, threads: int, window: int, batch: int = 8) -> PairStream:
        """From the images or from their latents."""
        payload = latents_of(self.latents, self.pairs, mirrored=False) if latents else None
        plan = StreamPlan(seed=0, batch=batch, micro_batch=8, window=window, sizes=SIZES,
                          workers=threads)  # fmt: skip
        return PairStream(self.pairs, self.source, plan, payload)


# --- what is streamed ----------------------------------------------------------------------------


def make_world(root: Path, num_files: int, rows: int, *, images: bool) -> World:
    """Files of so many pairs; without `images` theirs are one pixel, and the latents are real."""
    rng = np.random.default_rng(0)
    tiny = encode_jpeg(np.zeros((1, 1, 3), np.uint8))
    for number in range(num_files):
        names = [f"{number}-{row}" for row in range(rows)]
        sides = [[image(rng) if images else tiny for _ in range(rows)] for _ in range(2)]
        table = pa.table(
            {
                "caption": [f"prompt {name}" for name in names],
                "image_0_uid": [f"{name}-a" for name in names],
                "image_1_uid": [f"{name}-b" for name in names],
                "jpg_0": sides[0], "jpg_1": sides[1],
                "label_0": [1.0] * rows, "label_1": [0.0] * rows,
            }
        )  # fmt: skip
        path = root / "pairs" / f"train-{number:05d}.parquet"
        write_table(path, table, blobs=("jpg_0", "jpg_1"), row_group_rows=GROUP)
        writer = GroupWriter(root / "latents" / part_name(number), FORM.schema, FORM.settings)
        for at in range(0, rows, GROUP):
            writer.write(latents(rng, names[at : at + GROUP]))
        writer.close()
    source = open_pairs(PairsSpec(root=str(root / "pairs")))
    files = [describe(root / "latents" / part_name(number)) for number in range(num_files)]
    latent_set = LatentSet(root / "latents", Manifest(kind=KIND, settings={}, files=files), FORM)
    return World(source, decided(source), latent_set)


def image(rng: np.random.Generator) -> bytes:
    """Structure at several scales: about the 170 kB of a public set's images."""
    pixels = np.zeros((PIXELS, PIXELS, 3), np.float32)
    for cell, weight in ((96, 1.0), (12, 0.35), (2, 0.16)):
        coarse = rng.random((PIXELS // cell, PIXELS // cell, 3), np.float32)
        pixels += weight * np.kron(coarse, np.ones((cell, cell, 1), np.float32))
    return encode_jpeg((pixels / pixels.max() * 255).astype(np.uint8))


def latents(rng: np.random.Generator, names: Sequence[str]) -> pa.Table:
    """Random numbers in a row group of latents."""
    columns: dict[str, Any] = {"pair_id": names, "status": ["ok"] * len(names)}
    for side in (0, 1):
        numbers = rng.standard_normal((len(names), FORM.bytes // 2)).astype(np.float16)
        columns[f"latent_{side}"] = [row.tobytes() for row in numbers]
    return pa.table(columns, schema=FORM.schema)


def decided(source: PairSource) -> DecidedPairs:
    """All pairs of a source."""
    groups: list[RowGroup] = []
    group: list[int] = []
    row: list[int] = []
    in_file: list[int] = []
    names: list[str] = []
    for shard in source.shards:
        start = 0
        for number, (count, size) in enumerate(source.row_groups(shard)):
            group += [len(groups)] * count
            groups.append(RowGroup(shard, number, size))
            row += range(count)
            in_file += range(start, start + count)
            start += count
        names += [f"{shard.index}-{at}" for at in range(start)]
    table = pa.table(
        {
            "pair_id": names,
            "prompt": [f"prompt {name}" for name in names],
            "row": pa.array(in_file, pa.int64()),
            "image_0": [f"{name}-a" for name in names],
            "image_1": [f"{name}-b" for name in names],
            "winner": pa.array([0] * len(names), pa.int8()),
            **dict.fromkeys(("margin", "votes_0", "votes_1"), [1] * len(names)),
            **dict.fromkeys(("width_0", "height_0", "width_1", "height_1"), [PIXELS] * len(names)),
        }
    )
    return DecidedPairs(table, "bench", np.array(group), np.array(row), tuple(groups))


# --- speed ---------------------------------------------------------------------------------------


def speeds(root: Path, rows: int, blocks: int, threads: int) -> dict[str, Any]:
    """Pairs a second of both streams and of both floors, measured in turns."""
    world = make_world(root / "images", 2, rows, images=True)
    cached = make_world(root / "latents", 4, 8 * rows, images=False)
    tables = [table for shard in world.source.shards for table in world.source.read(shard)]
    contents = [
        c for table in tables for side in (0, 1) for c in table[f"image_{side}"].to_pylist()
    ]
    paths = [cached.latents.folder / file.name for file in cached.latents.manifest.files]
    ways: dict[str, Callable[[], object]] = {
        "images": lambda: drain(world.stream(latents=False, threads=threads, window=2)),
        "decoding alone": lambda: decode_all(contents, threads),
        "latents": lambda: drain(cached.stream(latents=True, threads=threads, window=2)),
        "reading alone": lambda: [path.read_bytes() for path in paths],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(blocks):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    count = dict.fromkeys(ways, len(world.pairs))
    count |= dict.fromkeys(("latents", "reading alone"), len(cached.pairs))
    speed = {name: count[name] / statistics.median(blocks) for name, blocks in seconds.items()}
    jpeg = sum(map(len, contents)) / len(contents)
    return {
        "pairs": count,
        "threads": threads,
        "kb_an_image": jpeg / 1000,
        "kb_a_latent": FORM.bytes / 1000,
        "pairs_per_s": speed,
        "floor_ratio": {
            "images": speed["images"] / speed["decoding alone"],
            "latents": speed["latents"] / speed["reading alone"],
        },
        "latents_ratio": speed["latents"] / speed["images"],
    }


def drain(stream: PairStream) -> None:
    """One epoch."""
    for _ in islice(stream.batches(Position()), stream.epoch_batches * stream.plan.batch // 8):
        pass


def decode_all(contents: Iterable[bytes], threads: int) -> None:
    """The same images, and nothing else."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda content: fit_square(decode(content), SIDE), contents):
            pass


# --- memory, resuming, ranks ---------------------------------------------------------------------


def memory(root: Path, rows: int, counts: Sequence[int]) -> list[dict[str, float]]:
    """What latents take while the files grow: stated, held, and the process's growth."""
    results = []
    for count in counts:
        world = make_world(root / str(count), count, rows, images=False)
        stream = world.stream(latents=True, threads=1, window=2, batch=64)
        before, most, grown = resident(), 0, 0
        for _ in islice(stream.batches(Position()), stream.epoch_batches * 8):
            done = [future.result() for future in set(stream._open.values()) if future.done()]
            most = max(most, sum(tensor.nbytes for one in done for tensor in one.values()))
            grown = max(grown, resident() - before)
        mib = {"stated_mib": stream.window_bytes, "held_mib": most, "grown_mib": grown}
        results.append({"files": count} | {name: value / 2**20 for name, value in mib.items()})
    return results


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Nothing:
    """A payload without images."""

    group: np.ndarray
    reads: int = field(default=0)

    def bytes_of(self, group: int) -> int:
        """None."""
        return 0

    def read(self, group: int) -> int:
        """Counts."""
        self.reads += 1
        return group

    def row(self, pair: int, group: int) -> int:
        """None of it."""
        return group

    def take(
        self, pairs: np.ndarray, labels: Sequence[Any], rows: Sequence[int], threads: Executor
    ) -> tuple[Images, Images]:
        """No image."""
        side = torch.zeros(len(pairs), 1, 1, 1, 1, 1)
        return side, side


def going_on(num_pairs: int) -> dict[str, float]:
    """Milliseconds from a position to its first batch, whatever the position."""
    group = np.arange(num_pairs) // 1500
    names = pa.array(np.arange(num_pairs)).cast(pa.string())
    ones = np.ones(num_pairs, np.int64)
    sizes = {f"{length}_{side}": ones for length in ("width", "height") for side in (0, 1)}
    words = {"pair_id": names, "prompt": names}
    votes = dict.fromkeys(("margin", "votes_0", "votes_1", "winner"), ones)
    table = pa.table(words | votes | sizes)
    shard = PairShard(0, "", "", num_pairs, 0)
    groups = tuple(RowGroup(shard, number, 0) for number in range(int(group[-1]) + 1))
    pairs = DecidedPairs(table, "bench", group, np.arange(num_pairs) % 1500, groups)
    plan = StreamPlan(seed=0, batch=2048, micro_batch=8, window=16, sizes=SIZES)
    times_ms = {}
    for share in (0.0, 0.5, 0.99):
        stream = PairStream(pairs, _NoSource(), plan, Nothing(np.arange(num_pairs) // GROUP))
        position = Position(3, int(share * stream.epoch_batches))
        start = time.perf_counter()
        next(stream.batches(position))
        times_ms[f"at_{share:.0%}"] = 1000 * (time.perf_counter() - start)
    return times_ms


class _NoSource:
    """A pair set that is never read."""

    root, shards = "", ()
    read = row_groups = read_row_group = fingerprint = NotImplemented


def reading_of_ranks(world: int) -> float:
    """Row groups that so many ranks open together in an epoch, a row group of the files."""
    group = np.repeat(np.arange(256), 256)
    order = epoch_order(group, 16, "bench")
    parts = [deal(order, 2048, rank, world) for rank in range(world)]
    return sum(len(np.unique(group[part])) for part in parts) / 256


# --- telling -------------------------------------------------------------------------------------


def show(speed: dict[str, Any], report: dict[str, Any]) -> None:
    """The tables."""
    console = Console(width=110)
    table = Table("stream", "kB an image", "pairs/s", "floor", "pairs/s", "of floor")
    for name, floor, size in (
        ("images", "decoding alone", speed["kb_an_image"]),
        ("latents", "reading alone", speed["kb_a_latent"]),
    ):
        speeds = speed["pairs_per_s"]
        row = f"{size:.0f}", f"{speeds[name]:.0f}", floor, f"{speeds[floor]:.0f}"
        table.add_row(name, *row, f"{speed['floor_ratio'][name]:.2f}")
    console.print(table, f"latents: {speed['latents_ratio']:.0f} times the pairs of images")
    grown = Table("files", "stated MiB", "held MiB", "process grew by MiB")
    for row in report["memory"]:
        grown.add_row(*(f"{value:.0f}" for value in row.values()))
    console.print(grown)
    late = ", ".join(f"{name[3:]}: {value:.0f} ms" for name, value in report["going_on_ms"].items())
    console.print(f"to the first batch of an epoch of {report['going_on_pairs']} pairs, at {late}")
    console.print(f"8 ranks open each row group {report['row_group_reads_of_8_ranks']:.2f} times")


def main() -> None:
    """Measure, tell, and leave the figures on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few pairs, to see that it runs")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    arguments = parser.parse_args()
    rows, blocks, many = (8, 1, 20_000) if arguments.quick else (64, 3, 1_000_000)
    files = (1, 2) if arguments.quick else (3, 30)
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as folder:
        speed = speeds(Path(folder) / "speed", rows, blocks, threads)
        report = {
            "memory": memory(Path(folder) / "memory", 2 * GROUP, files),
            "going_on_pairs": many,
            "going_on_ms": going_on(many),
            "row_group_reads_of_8_ranks": reading_of_ranks(8),
        }
    show(speed, report)
    machine = {"processor": platform.machine(), "cores": threads, "torch": torch.__version__}
    report = speed | report | {"machine": machine}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
