"""Reads this rank's batches of pairs, in the order that `order.py` and `units.py` compute."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.artifacts.atomic import ShardError
from data.images import Size
from data.pairs.schema import PairSource
from train.loader.crops import choose_sizes
from train.loader.dataset import DecidedPairs
from train.loader.epoch import Epoch, plan_epoch
from train.loader.image_source import Images, PairFileImages, PairImages, winner_first
from train.loader.order import (
    Position,
    deal,
    epoch_order,
    most_open_bytes,
    open_groups,
    windows_of,
)
from train.loader.text_source import CachedTexts
from train.loader.units import Batches, UnitOrder, deal_units


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs for one forward pass; images have one size, or are their latents."""

    epochs: tuple[int, ...]
    """The epoch of which each pair is a visit."""
    pair_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    winner: Images
    loser: Images
    margin: Int[Tensor, " pair"]
    """The winner's lead in votes; below 0 if the votes were overruled."""
    vote_fraction: Float[Tensor, " pair"]
    """The winner's fraction of the votes cast, in [0, 1]; 1 where none was cast."""
    size: Int[Tensor, "pair 2 2"]
    """Height and width of winner and loser in pixels, before they were cut."""
    cut: Size
    """The size to which they were cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """How pairs become batches; `seed`, `batch`, `window`, `sizes` and `unit` decide the order."""

    seed: int
    batch: int
    """Pairs in a global batch."""
    micro_batch: int
    """Pairs in a forward pass on one rank."""
    window: int
    sizes: tuple[Size, ...]
    """The sizes to which images are cut; each pair has that which fits it best."""
    unit: int = 1
    """With several sizes: pairs of one that are dealt together."""
    rank: int = 0
    world_size: int = 1
    workers: int = 1
    """Threads that decode; another one reads."""
    memory_mb: int = 8192
    """Most MiB of row groups in memory on each rank."""


@dataclass(slots=True)
class PairStream:
    """This rank's batches, from any position on, without end."""

    pairs: DecidedPairs
    source: PairSource
    plan: StreamPlan
    latents: PairImages | None = None
    """Read instead of the images, if there are any."""
    texts: CachedTexts | None = None
    """Reads the encoded prompts of the pairs, if there are any."""
    size: np.ndarray = field(init=False)
    """The size of each pair, as index into `plan.sizes`."""
    payload: PairImages = field(init=False)
    """Where the images or latents are read from."""
    units: UnitOrder | None = field(init=False)
    """The order of pairs of several sizes; None where all have one."""
    _open: dict[int, Future[Any]] = field(default_factory=dict)
    """Number of a row group -> the row group, in memory or being read."""

    def __post_init__(self) -> None:
        pairs, plan = self.pairs, self.plan
        self.size, self.units = choose_sizes(pairs.table, plan.sizes), None
        self.payload = self.latents or PairFileImages(
            self.source, pairs.groups, pairs.group, pairs.row, self.size, plan.sizes
        )
        if len(plan.sizes) > 1:
            _, numbers = np.unique(self.size, return_inverse=True)
            per_batch = plan.batch // plan.unit
            self.units = UnitOrder(
                pairs.group, numbers, plan.window, plan.unit, per_batch, self._key
            )
        self._check()

    def _check(self) -> None:
        """Refuse too few pairs, a batch that cannot be divided, and too much memory."""
        plan, num_pairs = self.plan, len(self.pairs)
        if num_pairs == 0:
            raise ShardError(
                "no pair of the label set has a winner; choose another vote or tie rule "
                "(vote=majority_human), or more pairs"
            )
        if num_pairs < plan.batch:
            raise ShardError(
                f"the label set has {num_pairs} decided pairs, fewer than one batch; "
                f"set train.batch={plan.batch} to at most {num_pairs}, or label more pairs"
            )
        if plan.batch % (plan.micro_batch * plan.world_size):
            raise ValueError(
                f"train.batch={plan.batch} is no multiple of train.micro_batch={plan.micro_batch} "
                f"x {plan.world_size} processes; change one of them (processes: NPROC=...)"
            )
        if self.units is not None and plan.unit % plan.micro_batch:
            raise ValueError(
                f"train.buckets.unit={plan.unit} is no multiple of a process's micro-batch of "
                f"{plan.micro_batch}, whose pairs have one size; lower train.micro_batch"
            )
        if self.window_bytes > plan.memory_mb << 20:
            smaller = "" if self.latents else ", or write latents (docs/latents.md)"
            raise ValueError(
                f"train.window={plan.window} row groups of these files take up to "
                f"{self.window_bytes >> 20} MiB on each rank, more than "
                f"train.memory_mb={plan.memory_mb}; lower the window, raise the bound{smaller}"
            )

    @property
    def epoch_batches(self) -> int:
        """Whole global batches of an epoch, of several sizes on average.

        Where all pairs have one size, the remaining ones wait for the next order.
        """
        return len(self.pairs) // self.plan.batch

    @property
    def window_bytes(self) -> int:
        """An upper bound of the bytes of row groups in memory; see `most_open_bytes`.

        Of several sizes it includes the rows that wait until their unit is complete, which are as
        large as rows are on average.
        """
        units, first = np.unique(self.payload.group, return_index=True)
        sizes = np.zeros(len(self.pairs.groups), np.int64)
        bytes_of = [self.payload.bytes_of(unit) for unit in units.tolist()]
        np.add.at(sizes, self.pairs.group[first], bytes_of)
        waiting = self.most_waiting * int(sizes.sum()) // len(self.pairs)
        return most_open_bytes(sizes, self.plan.window) + waiting

    @property
    def most_waiting(self) -> int:
        """Most pairs of several sizes whose rows wait: of two units of each size, and of a batch.

        The two are one of the epoch's own pairs and one with those that earlier epochs left over;
        a batch has whole units that were left over, and with several ranks this rank's part of one
        batch waits until its micro-batches are complete.
        """
        plan = self.plan
        if self.units is None:
            return 0
        parts = plan.batch // plan.world_size if plan.world_size > 1 else 0
        return 2 * len(np.unique(self.size)) * plan.unit + plan.batch + parts

    @property
    def relative_area(self) -> float:
        """Pixels of the pairs' images on average, relative to the largest of the sizes."""
        areas = np.array([size.width * size.height for size in self.plan.sizes])
        return float(areas[self.size].mean() / areas.max())

    def num_batches(self, epoch: int) -> int:
        """Global batches of an epoch."""
        return self.epoch_batches if self.units is None else self.units.num_batches(epoch)

    def after(self, position: Position) -> Position:
        """The position one global batch later."""
        position = self._at(position)
        return self._at(Position(position.epoch, position.batches + 1))

    def _at(self, position: Position) -> Position:
        """The position of the next batch, which may be in a later epoch."""
        while position.batches >= self.num_batches(position.epoch):
            position = Position(position.epoch + 1, 0)
        return position

    def batches(self, position: Position) -> Iterator[PairBatch]:
        """This rank's batches of `micro_batch` pairs from a position on."""
        with ThreadPoolExecutor(max(1, self.plan.workers)) as threads, _one_reader() as reader:
            self._open = {}
            now = self._epoch(self._at(position))
            while True:
                later = self._epoch(self._at(Position(now.number + 1)), now)
                yield from self._of_epoch(now, later, threads, reader)
                now = later

    def _of_epoch(
        self, now: Epoch, later: Epoch, threads: Executor, reader: Executor
    ) -> Iterator[PairBatch]:
        """The batches of an epoch, while the first row groups of the next one are read."""
        place, rows = 0, dict[int, Any]()
        each = zip(now.visit.tolist(), now.batches.pairs, now.batches.epochs, strict=True)
        for visits, pairs, epochs in each:
            while place <= max(visits):
                chunk = now.chunk(place, max(visits) + 1, self.plan.micro_batch)
                self._open_due(now, later, chunk, reader)
                for number in chunk:
                    pair = int(now.visits[number])
                    group = self._open[int(self.payload.group[pair])]
                    rows[number] = self.payload.row(pair, group.result())
                place = chunk.stop
            yield self._load(pairs, epochs, [rows.pop(number) for number in visits], threads)

    def _key(self, epoch: int) -> str:
        return f"{self.pairs.identity}/{self.plan.seed}/{epoch}"

    def _epoch(self, position: Position, before: Epoch | None = None) -> Epoch:
        """Plan this rank's part of an epoch from a position on; it costs the same wherever that is.

        Its first row groups are read in the last window of the epoch before.
        """
        plan, key = self.plan, self._key(position.epoch)
        order = epoch_order(self.pairs.group, plan.window, key)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        mine = self._mine(position.epoch, order, place)
        done = position.batches * (plan.batch // (plan.micro_batch * plan.world_size))
        left = Batches(mine.pairs[done:], mine.epochs[done:])
        window = windows_of(self.pairs.group, plan.window, key)
        lead = before.last_window if before else 0
        return plan_epoch(position.epoch, left, place, window, self.payload.group, lead)

    def _mine(self, epoch: int, order: np.ndarray, place: np.ndarray) -> Batches:
        """This rank's micro-batches of an epoch, which visits the pairs in this order."""
        plan = self.plan
        if self.units is None:
            pairs = deal(order, plan.batch, plan.rank, plan.world_size)
            pairs = pairs.reshape(-1, plan.micro_batch)
            return Batches(pairs, np.full_like(pairs, epoch))
        batches = self.units.batches(epoch, place)
        return deal_units(batches, self.size, place, plan.micro_batch, plan.rank, plan.world_size)

    def _open_due(self, now: Epoch, later: Epoch, chunk: range, reader: Executor) -> None:
        """Keep the row groups of `open_groups`, start to read new ones, and drop all others."""
        due = open_groups(now.reading, later.reading, chunk.start, len(chunk), len(now.visits))
        before, self._open = self._open, {}
        for group in due:
            self._open[group] = before.get(group) or reader.submit(self.payload.read, group)

    def pick(self, indices: np.ndarray) -> PairBatch:
        """Read some pairs of one size as a batch of the first epoch, apart from the stream."""
        numbers = self.payload.group[indices].tolist()
        groups = {number: self.payload.read(number) for number in dict.fromkeys(numbers)}
        rows = [
            self.payload.row(pair, groups[number])
            for pair, number in zip(indices.tolist(), numbers, strict=True)
        ]
        with ThreadPoolExecutor(max(1, self.plan.workers)) as threads:
            return self._load(indices, np.zeros_like(indices), rows, threads)

    def _load(
        self, pairs: np.ndarray, epochs: np.ndarray, rows: list[Any], threads: Executor
    ) -> PairBatch:
        labels = self.pairs.table.take(pairs).to_pylist()
        winner, loser = self.payload.take(pairs, labels, rows, threads)
        return PairBatch(
            tuple(epochs.tolist()),
            tuple(label["pair_id"] for label in labels),
            tuple(label["prompt"] for label in labels),
            winner,
            loser,
            torch.tensor([label["margin"] for label in labels]),
            torch.tensor([_vote_fraction(label) for label in labels]),
            torch.tensor([_sizes(label) for label in labels]),
            self.plan.sizes[int(self.size[pairs[0]])],
        )


def _vote_fraction(label: Mapping[str, Any]) -> float:
    winner, loser = (label[f"votes_{side}"] or 0 for side in winner_first(label))
    return winner / (winner + loser) if winner + loser else 1.0


def _sizes(label: Mapping[str, Any]) -> list[list[int]]:
    return [[label[f"height_{side}"], label[f"width_{side}"]] for side in winner_first(label)]


@contextmanager
def _one_reader() -> Iterator[Executor]:
    """A thread for reading; reads that have not started are cancelled at the end."""
    reader = ThreadPoolExecutor(1, "reader")
    try:
        yield reader
    finally:
        reader.shutdown(cancel_futures=True)
