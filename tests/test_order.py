"""The order of pairs: properties over drawn row groups, windows, batches and numbers of ranks."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pairs.schema import PairShard, PairSource
from train.loader.dataset import DecidedPairs
from train.loader.image_source import Images, RowGroup
from train.loader.loader import PairStream, StreamPlan
from train.loader.order import (
    Position,
    deal,
    epoch_order,
    most_open_bytes,
    open_groups,
    reading,
    windows_of,
)

GROUPS = st.lists(st.integers(0, 9), min_size=1, max_size=200).map(np.array)


# --- pure ----------------------------------------------------------------------------------------


@given(GROUPS, st.integers(1, 12), st.text(max_size=5))
def test_an_epoch_visits_every_pair_once(group: np.ndarray, window: int, key: str):
    order = epoch_order(group, window, key)
    assert sorted(order.tolist()) == list(range(len(group)))
    assert np.array_equal(order, epoch_order(group, window, key))


@given(GROUPS, st.integers(1, 12))
def test_only_a_window_of_row_groups_is_open_at_a_time(group: np.ndarray, window: int):
    order = epoch_order(group, window, "key")
    visited, position = group[order], 0
    assert (np.diff(windows_of(group, window, "key")[order]) >= 0).all()
    while position < len(visited):  # cut the visit greedily into windows: each group in one only
        here = list(dict.fromkeys(visited[position:]))[:window]
        size = int(np.isin(visited, here).sum())
        assert set(visited[position : position + size]) == set(here)
        position += size


def test_orders_differ_by_key_and_mix_within_the_window():
    group = np.repeat(np.arange(8), 16)
    first, second = epoch_order(group, 4, "a"), epoch_order(group, 4, "b")
    assert not np.array_equal(first, second)
    assert len(set(group[first[:16]])) > 2  # not one row group after the other


def test_the_order_is_pinned():
    """A change of order makes checkpoints resume with other pairs; it must not come by accident."""
    order = epoch_order(np.repeat(np.arange(4), 3), 2, "golden")
    assert order.tolist() == [2, 10, 11, 0, 1, 9, 7, 3, 6, 5, 8, 4]
    assert deal(order, 4, 0, 1).tolist() == [[2, 10, 11, 0], [1, 9, 7, 3], [6, 5, 8, 4]]
    assert deal(order, 4, 1, 2).tolist() == [[10, 11], [9, 7], [6, 8]]


@given(st.integers(0, 50), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 9))
def test_ranks_are_disjoint_equal_and_together_the_batch(
    rows: int, each: int, world: int, seed: int
):
    batch, order = each * world, np.random.default_rng(seed).permutation(rows)
    parts = [deal(order, batch, rank, world) for rank in range(world)]
    for part in parts:
        assert part.shape == (rows // batch, each)
        for number, mine in enumerate(part):  # in the order's order
            whole = order[number * batch : (number + 1) * batch].tolist()
            assert [whole.index(pair) for pair in mine] == sorted(map(whole.index, mine))
    for number in range(rows // batch):
        ranks = [set(part[number].tolist()) for part in parts]
        assert set.union(*ranks) == set(order[number * batch : (number + 1) * batch].tolist())
        assert all(max(one) < min(two) for one, two in zip(ranks, ranks[1:], strict=False))


@given(GROUPS, st.integers(1, 5), st.integers(0, 30))
def test_a_row_group_is_due_before_its_first_use_and_within_the_window_before(
    group: np.ndarray, window: int, lead: int
):
    order = epoch_order(group, window, "key")
    visited, windows = group[order], windows_of(group, window, "key")[order]
    plan = reading(visited, windows, lead)
    assert sorted(plan.groups.tolist()) == sorted(set(group.tolist()))
    assert (np.diff(plan.due) >= 0).all()
    for one, due, last in zip(plan.groups, plan.due, plan.last, strict=True):
        uses = np.flatnonzero(visited == one)
        assert last == uses[-1]
        assert due <= uses[0]
        before = windows[uses[0]] - 1
        start = np.flatnonzero(windows == before)[0] if before >= 0 else -lead
        assert due >= start


def test_the_next_epochs_first_window_is_read_during_this_ones_last():
    """Two windows of 4 pairs in an epoch: groups 0 and 1, then 2 and 3."""
    window = np.repeat([0, 1], 4)
    now = reading(np.array([0, 1, 0, 1, 2, 3, 3, 2]), window, 0)
    later = reading(np.array([3, 2, 2, 3, 0, 1, 0, 1]), window, 4)
    at = [open_groups(now, later, 5, place, 2, 8) for place in (0, 2, 4, 6)]
    assert at == [
        [(5, 0), (5, 1), (5, 2)],
        [(5, 0), (5, 1), (5, 2), (5, 3)],
        [(5, 2), (5, 3), (6, 3)],
        [(5, 2), (5, 3), (6, 3), (6, 2)],
    ]


@pytest.mark.parametrize(
    ("window", "stretch", "most"),
    [
        (1, 2, 9 + 7),  # two windows of one row group: used up, and read
        (1, 4, 9 + 7 + 5),  # a window has 2 pairs at least: 4 pairs may lie in three of them
        (1, 8, 9 + 7 + 5 + 3),  # all there are
        (2, 2, 9 + 7 + 5 + 3),
    ],
)
def test_the_bound_of_memory_counts_the_windows_that_a_stretch_touches(
    window: int, stretch: int, most: int
):
    sizes, num_pairs = np.array([3, 9, 5, 7]), np.array([4, 2, 3, 2])
    assert most_open_bytes(sizes, num_pairs, window, stretch) == most


# --- the stream, without files -------------------------------------------------------------------


@dataclass
class Counted:
    """A payload that counts what is asked of it."""

    group: np.ndarray
    reads: Counter = field(default_factory=Counter)
    taken: int = 0

    def bytes_of(self, group: int) -> int:
        return 1 + group % 3

    def read(self, group: int) -> int:
        self.reads[group] += 1
        return group

    def take(
        self, pairs: np.ndarray, labels: Sequence[Any], groups: Sequence[int], threads: Executor
    ) -> tuple[Images, Images]:
        assert list(groups) == self.group[pairs].tolist()
        self.taken += 1
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

    @property
    def batch(self) -> int:
        return self.world * self.each * self.micro

    def stream(self, rank: int = 0, **change: int) -> PairStream:
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        inside = np.concatenate([np.arange(size) for size in self.sizes]) // self.parts
        _, unit = np.unique(group * 1000 + inside, return_inverse=True)
        count = len(group)
        table = pa.table(
            {
                "pair_id": [str(i) for i in range(count)],
                "prompt": [""] * count,
                **dict.fromkeys(("margin", "votes_0", "votes_1"), [1] * count),
                "winner": [0] * count,
                **dict.fromkeys(("width_0", "height_0", "width_1", "height_1"), [512] * count),
            }
        )
        shard = PairShard(0, "", "", count, 0)
        groups = tuple(RowGroup(shard, i, 0) for i in range(len(self.sizes)))
        pairs = DecidedPairs(table, "rows", group, np.arange(count), groups)
        plan = StreamPlan(
            seed=self.seed, batch=self.batch, micro_batch=self.micro, window=self.window, side=8,
            rank=rank, world_size=self.world,
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


@settings(max_examples=40, deadline=None)
@given(cases())
def test_an_epoch_is_a_partition_into_global_batches_that_any_number_of_ranks_shares(case: Case):
    batches = global_batches(case)
    assert sum(len(one) for one in batches) == len(set.union(*batches))  # no pair twice
    assert len(set.union(*batches)) == sum(case.sizes) // case.batch * case.batch
    alone = replace(case, world=1, each=case.each * case.world)
    assert global_batches(alone) == batches
    other = replace(alone, each=case.batch, micro=1)
    assert global_batches(other) == batches


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_resuming_anywhere_gives_the_rest_and_repeats_no_work(case: Case, data: st.DataObject):
    rank = data.draw(st.integers(0, case.world - 1))
    stream = case.stream(rank)
    per_epoch = stream.epoch_batches
    done = data.draw(st.integers(0, 2 * per_epoch))
    at = Position(done // per_epoch, done % per_epoch)
    straight = ids(case.stream(rank), (2 * per_epoch + 1) * case.each)
    first = next(stream.batches(at)).pair_ids
    assert first == straight[done * case.each]
    assert stream.payload.taken == 1  # type: ignore[attr-defined]
    assert stream.payload.reads.total() <= len(stream._open)  # type: ignore[attr-defined]
    rest = ids(case.stream(rank), (2 * per_epoch + 1 - done) * case.each, at)
    assert rest == straight[done * case.each :]


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_memory_stays_within_what_is_said_and_nothing_is_read_twice(
    case: Case, data: st.DataObject
):
    stream = case.stream(data.draw(st.integers(0, case.world - 1)))
    payload = stream.payload
    epochs = 3
    for _ in islice(stream.batches(Position()), epochs * stream.epoch_batches * case.each):
        open_groups = {id(future): group for (_, group), future in stream._open.items()}
        assert sum(map(payload.bytes_of, open_groups.values())) <= stream.window_bytes
    reads = payload.reads  # type: ignore[attr-defined]
    assert max(reads.values()) <= epochs + 1  # the next epoch has begun to be read


def test_ranks_share_the_reading_and_do_not_all_read_everything():
    """32 row groups in windows of 16: each of 4 ranks reads about its quarter, not all of them."""
    case = Case((64,) * 32, 64, 16, world=4, each=8, micro=8, seed=0)
    total = 0
    for rank in range(4):
        stream = case.stream(rank)
        ids(stream, stream.epoch_batches * case.each)
        total += sum(min(count, 1) for count in stream.payload.reads.values())  # type: ignore[attr-defined]
    assert total < 2 * 32


def test_the_way_to_a_far_position_is_not_longer():
    """The millionth epoch, its last batch: as many row groups are asked for as at the beginning."""
    case = Case((64,) * 40, 64, 4, world=1, each=8, micro=8, seed=0)
    near, far = case.stream(), case.stream()
    next(near.batches(Position(0, 0)))
    next(far.batches(Position(1_000_000, far.epoch_batches - 1)))
    for stream in (near, far):
        assert len(stream._open) <= 8
        assert stream.payload.taken == 1  # type: ignore[attr-defined]
