"""Streams of pairs without files, over any row groups, sizes, batches and numbers of ranks."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from hypothesis import strategies as st

from data.images import Size
from data.pairs.schema import PairShard, PairSource
from train.loader.dataset import DecidedPairs
from train.loader.image_source import Images, RowGroup
from train.loader.loader import PairStream, StreamPlan
from train.loader.order import Position

SIZES = (Size(8, 8), Size(16, 8), Size(8, 16))


@dataclass
class Counted:
    """A payload that counts what is asked of it."""

    group: np.ndarray
    reads: Counter = field(default_factory=Counter)
    taken: int = 0
    waiting: int = 0
    """Rows that were given out and are not used yet."""

    def bytes_of(self, group: int) -> int:
        return 1 + group % 3

    def read(self, group: int) -> int:
        self.reads[group] += 1
        return group

    def row(self, pair: int, group: int) -> int:
        assert group == self.group[pair]
        self.waiting += 1
        return pair

    def take(
        self, pairs: np.ndarray, labels: Sequence[Any], rows: Sequence[int], threads: Executor
    ) -> tuple[Images, Images]:
        assert list(rows) == pairs.tolist()
        self.taken += 1
        self.waiting -= len(rows)
        side = torch.tensor(pairs).view(-1, 1, 1, 1, 1, 1).float()
        return side, side


class NoFiles(PairSource):
    """The stream reads its payload, and no pair file."""

    root, shards = Path(), ()


@dataclass(frozen=True)
class Case:
    """Row groups of pair files, each with so many decided pairs, cut into so many of latents."""

    sizes: tuple[int, ...]
    parts: int
    window: int
    world: int
    each: int
    micro: int
    seed: int
    aspects: tuple[int, ...] = (0,)
    """The pairs' best sizes, as indices into `SIZES`, over and over."""
    unit: int = 1

    @property
    def batch(self) -> int:
        return self.world * self.each * self.micro

    def stream(self, rank: int = 0, **change: int) -> PairStream:
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        inside = np.concatenate([np.arange(size) for size in self.sizes]) // self.parts
        _, unit = np.unique(group * 1000 + inside, return_inverse=True)
        count = len(group)
        of_pairs = np.resize(self.aspects, count)
        lengths = {
            f"{name}_{side}": [64 * getattr(SIZES[index], name) for index in of_pairs]
            for name in ("width", "height")
            for side in (0, 1)
        }
        table = pa.table(
            {
                "pair_id": [str(i) for i in range(count)],
                "prompt": [""] * count,
                **dict.fromkeys(("margin", "votes_0", "votes_1"), [1] * count),
                "winner": [0] * count,
                **lengths,
            }
        )
        shard = PairShard(0, "", "", count, 0)
        groups = tuple(RowGroup(shard, i, 0) for i in range(len(self.sizes)))
        pairs = DecidedPairs(table, "rows", group, np.arange(count), groups)
        plan = StreamPlan(
            seed=self.seed, batch=self.batch, micro_batch=self.micro, window=self.window,
            sizes=SIZES[: 1 + max(self.aspects)], unit=self.unit, rank=rank, world_size=self.world,
        )  # fmt: skip
        return PairStream(pairs, NoFiles(), replace(plan, **change), Counted(unit))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=12)))
    world, each, micro = draw(
        st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3)).filter(
            lambda sizes_drawn: np.prod(sizes_drawn) <= sum(sizes)
        )
    )
    return Case(sizes, draw(st.integers(1, 5)), draw(st.integers(1, 4)), world, each, micro,
                draw(st.integers(0, 3)))  # fmt: skip


def ids(stream: PairStream, count: int, at: Position | None = None) -> list[tuple[str, ...]]:
    return [batch.pair_ids for batch in islice(stream.batches(at or Position()), count)]


def global_batches(case: Case, epochs: int = 1) -> list[set[str]]:
    """The pairs of each global batch, put together from all ranks."""
    count = case.stream().epoch_batches * epochs
    batches: list[set[str]] = [set() for _ in range(count)]
    for rank in range(case.world):
        mine = ids(case.stream(rank), count * case.each)
        assert {len(one) for one in mine} == {case.micro}  # equal parts, equal numbers of them
        for number, one in enumerate(mine):
            assert not batches[number // case.each] & set(one)
            batches[number // case.each] |= set(one)
    assert {len(one) for one in batches} == {case.batch}
    return batches
