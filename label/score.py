"""Pair shards x the metrics they lack -> score shards, in one pass over the pictures."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.latents import KIND as LATENTS
from data.pairs import PairShard, PairSource, image_key, pair_key
from data.shards import sha256_of, write_table
from data.tables import PAIR_FACTS, SCORES, Status
from label.config import MetricSpec
from label.decode import Decoder
from label.latents import Encoder, PairPictures, ShardLatents
from label.metrics import Panel
from label.metrics.passes import Batch, Clock, Outcome, Pass
from label.plan import FACTS, ScoreSets, Work

READ_ROWS = 64
"""Pairs read at a time; with 170 kB a picture, 20 MB."""
STRETCH = 512
"""Reads a pass: within these 32 768 pairs nothing is computed twice, and no more embeddings than
theirs are in memory. Public pair files have about 1 500 pairs."""

PARTS = ("load", "read", "decode", "embed", "score", "latents", "write")
"""What the main process spent its time on; `decode` is waiting where workers decode."""
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tools:
    """What scores a shard, apart from the shard."""

    pairs: PairSource
    panel: Panel
    sets: ScoreSets
    decoder: Decoder
    batch: Batch
    clock: Clock
    advance: Callable[[int], None]
    """Told how many pairs were read."""
    encoder: Encoder | None = None
    """Makes latents, where they are asked."""


def score_shard(work: Work, tools: Tools) -> None:
    """Score one pair shard by the metrics it lacks and write their files."""
    panel = tools.panel.only([name for name in work.sets if name not in (FACTS, LATENTS)])
    reader = _timed(tools.pairs.read(work.shard, batch_rows=READ_ROWS), tools.clock)
    rows = _Rows(work.shard)
    with ThreadPoolExecutor(1) as background, ExitStack() as stack:
        # hashing releases the GIL and reads what we read
        digest = background.submit(sha256_of, work.shard.path) if FACTS in work.sets else None
        latents = None
        if LATENTS in work.sets and tools.encoder:
            folder = tools.sets.folder_of(LATENTS)
            latents = stack.enter_context(ShardLatents(tools.encoder, folder, tools.clock))
        while _score_stretch(islice(reader, STRETCH), panel, rows, tools, latents):
            pass
        with tools.clock.measure("write"):
            for name in work.sets:
                path = tools.sets.path(name, work.shard)
                settings = tools.sets.settings(name, work.shard)
                if name == FACTS and digest is not None:
                    settings["source"]["sha256"] = digest.result()
                if name == LATENTS and latents:
                    latents.write(path, rows.latent_rows(), settings)
                    continue
                table = rows.facts() if name == FACTS else rows.scores(name)
                write_table(path, table, settings)


def _score_stretch(
    tables: Iterable[pa.Table],
    panel: Panel,
    rows: "_Rows",
    tools: Tools,
    latents: ShardLatents | None,
) -> bool:
    """Score some pairs in one pass; false when there are no more."""
    scoring = panel.start(tools.decoder, tools.batch, tools.clock, latents)
    places: list[tuple[int, int]] = []
    for table in tables:
        places += rows.read(table, scoring)
        tools.advance(table.num_rows)
    if places:
        rows.found(scoring.finish(), np.array(places))
    return bool(places)


@dataclass(slots=True)
class _Rows:
    """The columns of a shard's files, growing stretch by stretch."""

    shard: PairShard
    columns: dict[str, list[object]] = field(
        default_factory=lambda: {name: [] for name in PAIR_FACTS.names}
    )
    seen: Counter[str] = field(default_factory=Counter)
    per_metric: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Scores, (pair, 2)."""
    statuses: list[tuple[Status, Status]] = field(default_factory=list)
    """What is known of both pictures of a pair, whatever the metric."""
    pictures: list[tuple[bytes, bytes]] = field(default_factory=list)
    """The `image_key`s of both pictures of a pair."""

    def read(self, table: pa.Table, scoring: Pass) -> list[tuple[int, int]]:
        """Give pairs to a pass; where it will put the scores of both images."""
        places = []
        for pair in table.to_pylist():
            prompt, left, right = (
                pair["prompt"] or "",
                pair["image_0"] or b"",
                pair["image_1"] or b"",
            )
            keys = image_key(left), image_key(right)
            self.pictures.append(keys)
            places.append((scoring.add(left, prompt, keys[0]), scoring.add(right, prompt, keys[1])))
            name = pair_key(*keys, prompt)
            human = pair["human"]
            self._append(
                pair_id=f"{name}-{self.seen[name]}",
                prompt=prompt,
                source=self.shard.name,
                row=pair["row"],
                image_0=pair["uid_0"],
                image_1=pair["uid_1"],
                human=None if human is None or np.isnan(human) else human,
            )
            self.seen[name] += 1
        return places

    def found(self, outcome: Outcome, places: np.ndarray) -> None:
        """Take what a pass found for the pairs read since the last call."""
        prompts = self.columns["prompt"][-len(places) :]
        for (left, right), prompt in zip(places.tolist(), prompts, strict=True):
            pictures = outcome.pictures[left], outcome.pictures[right]
            bad = [
                (picture.status, f"image {side}: {picture.reason}")
                for side, picture in enumerate(pictures)
                if picture.status is not Status.OK
            ]
            empty = not str(prompt).strip()
            if empty:
                bad.append((Status.EMPTY_PROMPT, "the prompt is empty"))
            for side, picture in enumerate(pictures):
                self._append(**{f"width_{side}": picture.width, f"height_{side}": picture.height})
            self._append(
                status=bad[0][0] if bad else Status.OK, reason="; ".join(why for _, why in bad)
            )
            first, second = (
                Status.EMPTY_PROMPT if empty and p.status is Status.OK else p.status
                for p in pictures
            )
            self.statuses.append((first, second))
        for metric, scores in outcome.scores.items():
            self.per_metric.setdefault(metric, []).append(scores[places])

    def facts(self) -> pa.Table:
        """The pairs' facts, in the schema of their set."""
        columns = {**self.columns, "status": [str(status) for status in self.columns["status"]]}
        return pa.table(columns, schema=PAIR_FACTS)

    def latent_rows(self) -> Iterator[PairPictures]:
        """The pairs as their latents' set asks for them."""
        names, statuses = self.columns["pair_id"], self.columns["status"]
        for name, keys, status in zip(names, self.pictures, statuses, strict=True):
            yield PairPictures(str(name), keys, Status(str(status)))

    def scores(self, metric: str) -> pa.Table:
        """One metric's scores, in the schema of its set; null where the status is not ok."""
        parts = self.per_metric.get(metric, [])
        values = np.concatenate(parts) if parts else np.zeros((0, 2), np.float32)
        columns: dict[str, object] = {"pair_id": self.columns["pair_id"]}
        for side in (0, 1):
            status = [
                Status.NOT_FINITE if known[side] is Status.OK and not finite else known[side]
                for known, finite in zip(
                    self.statuses, np.isfinite(values[:, side]).tolist(), strict=True
                )
            ]
            bad = np.array([value is not Status.OK for value in status], dtype=bool)
            columns[f"score_{side}"] = pa.array(values[:, side], pa.float32(), mask=bad)
            columns[f"status_{side}"] = [str(value) for value in status]
        return pa.table({name: columns[name] for name in SCORES.names}, schema=SCORES)

    def _append(self, **values: object) -> None:
        for name, value in values.items():
            self.columns[name].append(value)


def _timed(items: Iterable[T], clock: Clock) -> Iterator[T]:
    """The items, with the time to get each of them counted as reading."""
    iterator = iter(items)
    while True:
        with clock.measure("read"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def needed_metrics(work: Sequence[Work]) -> list[str]:
    """The metrics that must be loaded for this work."""
    sets = dict.fromkeys(name for one in work for name in one.sets)
    return [name for name in sets if name not in (FACTS, LATENTS)]


def device_of(name: str, local_rank: int) -> torch.device:
    """The device of this process: `auto` and `cuda` give each process on a machine its own GPU.

    Raises:
        ValueError: A GPU is asked for that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    index = int(name.removeprefix("cuda:")) if name.startswith("cuda:") else local_rank
    if index >= count:
        raise ValueError(
            f"label.device={name} means GPU {index} for this process, but torch sees {count}; "
            "start no more processes than GPUs, or set label.device=cpu"
        )
    return torch.device("cuda", index)


def leave_cores_to(workers: int) -> None:
    """Keep torch off the cores that decode: threads that wait for each other cost far more.

    On two busy cores, one thread embeds a miniature batch ten times as fast as two.
    """
    cores = len(os.sched_getaffinity(0)) - workers
    torch.set_num_threads(max(1, min(cores, torch.get_num_threads())))


@dataclass(frozen=True, slots=True)
class Scoring:
    """A rank's share of the scoring."""

    pairs: PairSource
    sets: ScoreSets
    specs: Mapping[str, MetricSpec]
    device: torch.device
    batch: int
    workers: int
    encoder: Callable[[], Encoder] | None = None
    """Loads what makes latents, where some are to be written."""

    def run(self, work: Sequence[Work], console: Console | None) -> None:
        """Score shard by shard, with a progress bar and the seconds of each part at the end."""
        clock, batch = Clock(), Batch(self.batch)
        if self.device.type == "cpu":
            leave_cores_to(self.workers)
        num_pairs = sum(one.shard.rows for one in work)
        with clock.measure("load"):
            panel = Panel.load(self.specs, self.device)
            encoder = self.encoder() if self.encoder else None
        quiet = console is None
        with Decoder(self.workers) as decoder, Progress(*BARS, disable=quiet) as progress:
            bar = progress.add_task("scoring pairs", total=num_pairs)
            advance = partial(progress.advance, bar)
            tools = Tools(self.pairs, panel, self.sets, decoder, batch, clock, advance, encoder)
            for one in work:
                score_shard(one, tools)
        if console is not None:
            parts = " · ".join(f"{part} {clock.seconds.get(part, 0):.1f} s" for part in PARTS)
            line = f"{num_pairs} pairs on {self.device}: {parts}"
            console.print(line, highlight=False, soft_wrap=True)
