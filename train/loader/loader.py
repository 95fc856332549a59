"""Reads this rank's batches of pairs, in the order that `order.py` computes."""

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
from data.pairs.schema import PairSource
from train.loader.dataset import DecidedPairs
from train.loader.image_source import Images, PairFileImages, PairImages, winner_first
from train.loader.order import (
    Position,
    Reading,
    deal,
    epoch_order,
    most_open_bytes,
    open_groups,
    reading,
    windows_of,
)
from train.loader.text_source import CachedTexts


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs for one forward pass; images are square, or their latents."""

    epoch: int
    pair_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    winner: Images
    loser: Images
    margin: Int[Tensor, " pair"]
    """The winner's lead in votes; below 0 if the votes were overruled."""
    vote_fraction: Float[Tensor, " pair"]
    """The winner's fraction of the votes cast, in [0, 1]; 1 where none was cast."""
    size: Int[Tensor, "pair 2 2"]
    """Height and width of winner and loser in pixels, before they were made square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """How pairs become batches; only `seed`, `batch` and `window` decide the order."""

    seed: int
    batch: int
    """Pairs in a global batch."""
    micro_batch: int
    """Pairs in a forward pass on one rank."""
    window: int
    side: int
    """Pixels of the square images."""
    rank: int = 0
    world_size: int = 1
    workers: int = 1
    """Threads that decode; another one reads."""
    memory_mb: int = 8192
    """Most MiB of row groups in memory on each rank."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    """This rank's part of an epoch."""

    number: int
    pairs: np.ndarray
    """Its pairs of each global batch, (batch, pair)."""
    reading: Reading
    last_window: int
    """Number of its pairs in the last window."""


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
    payload: PairImages = field(init=False)
    """Where the images or latents are read from."""
    _open: dict[tuple[int, int], Future[Any]] = field(default_factory=dict)
    """(epoch, row group) -> the row group, in memory or being read."""

    def __post_init__(self) -> None:
        pairs, plan = self.pairs, self.plan
        images = PairFileImages(self.source, pairs.groups, pairs.group, pairs.row, plan.side)
        self.payload = self.latents or images
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
        if self.window_bytes > plan.memory_mb << 20:
            smaller = "" if self.latents else ", or write latents (docs/latents.md)"
            raise ValueError(
                f"train.window={plan.window} row groups of these files take up to "
                f"{self.window_bytes >> 20} MiB on each rank, more than "
                f"train.memory_mb={plan.memory_mb}; lower the window, raise the bound{smaller}"
            )

    @property
    def epoch_batches(self) -> int:
        """Whole global batches of an epoch; the remaining pairs wait for the next order."""
        return len(self.pairs) // self.plan.batch

    @property
    def window_bytes(self) -> int:
        """An upper bound of the bytes of row groups in memory; see `most_open_bytes`."""
        units, first = np.unique(self.payload.group, return_index=True)
        sizes = np.zeros(len(self.pairs.groups), np.int64)
        bytes_of = [self.payload.bytes_of(unit) for unit in units.tolist()]
        np.add.at(sizes, self.pairs.group[first], bytes_of)
        num_pairs = np.unique(self.pairs.group, return_counts=True)[1]
        alone = self.plan.world_size == 1  # else a rank's pairs may lie anywhere in a batch
        stretch = self.plan.micro_batch if alone else self.plan.batch
        return most_open_bytes(sizes, num_pairs, self.plan.window, stretch)

    def after(self, position: Position) -> Position:
        """The position one global batch later."""
        done = position.batches + 1
        if done == self.epoch_batches:
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, done)

    def batches(self, position: Position) -> Iterator[PairBatch]:
        """This rank's batches of `micro_batch` pairs from a position on."""
        size = self.plan.micro_batch
        with ThreadPoolExecutor(max(1, self.plan.workers)) as threads, _one_reader() as reader:
            self._open = {}
            now = self._epoch(position.epoch)
            later = self._epoch(position.epoch + 1, now)
            while True:
                if position.epoch != now.number:
                    now, later = later, self._epoch(position.epoch + 1, later)
                mine = now.pairs[position.batches]
                for start in range(0, len(mine), size):
                    place = position.batches * len(mine) + start
                    self._open_due(now, later, place, reader)
                    indices = mine[start : start + size]
                    numbers = self.payload.group[indices].tolist()
                    groups = [self._open[now.number, number].result() for number in numbers]
                    yield self._load(indices, now.number, groups, threads)
                position = self.after(position)

    def _epoch(self, number: int, before: _Epoch | None = None) -> _Epoch:
        """Plan this rank's part of an epoch; it costs the same wherever a run resumes.

        Its first row groups are read in the last window of the epoch before.
        """
        plan, key = self.plan, f"{self.pairs.identity}/{self.plan.seed}/{number}"
        order = epoch_order(self.pairs.group, plan.window, key)
        mine = deal(order, plan.batch, plan.rank, plan.world_size)
        window = windows_of(self.pairs.group, plan.window, key)[mine.ravel()]
        last_window = int((window == window[-1]).sum())
        lead = before.last_window if before else 0
        group = self.payload.group[mine.ravel()]
        return _Epoch(number, mine, reading(group, window, lead), last_window)

    def _open_due(self, now: _Epoch, later: _Epoch, place: int, reader: Executor) -> None:
        """Keep the row groups of `open_groups`, start to read new ones, and drop all others."""
        due = open_groups(
            now.reading, later.reading, now.number, place, self.plan.micro_batch, now.pairs.size
        )
        before, self._open = self._open, {}
        for epoch, group in due:
            same = (  # read for this epoch, or for the one before
                before.get((epoch, group))
                or self._open.get((epoch - 1, group))
                or before.get((epoch - 1, group))
            )
            self._open[epoch, group] = same or reader.submit(self.payload.read, group)

    def pick(self, indices: np.ndarray) -> PairBatch:
        """Read some pairs as one batch of the first epoch, independently of the stream."""
        numbers = self.payload.group[indices].tolist()
        groups = {number: self.payload.read(number) for number in dict.fromkeys(numbers)}
        with ThreadPoolExecutor(max(1, self.plan.workers)) as threads:
            return self._load(indices, 0, [groups[number] for number in numbers], threads)

    def _load(
        self, indices: np.ndarray, epoch: int, groups: list[Any], threads: Executor
    ) -> PairBatch:
        labels = self.pairs.table.take(indices).to_pylist()
        winner, loser = self.payload.take(indices, labels, groups, threads)
        return PairBatch(
            epoch,
            tuple(label["pair_id"] for label in labels),
            tuple(label["prompt"] for label in labels),
            winner,
            loser,
            torch.tensor([label["margin"] for label in labels]),
            torch.tensor([_vote_fraction(label) for label in labels]),
            torch.tensor([_sizes(label) for label in labels]),
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
