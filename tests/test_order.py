"""The order of pairs: properties over drawn row groups, windows, batches and numbers of ranks."""

from dataclasses import replace
from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers_stream import Case, cases, global_batches, ids
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
    """Two windows of 4 pairs in an epoch: groups 0 and 1, then 2 and 3; later 0 and 2 first."""
    window = np.repeat([0, 1], 4)
    now = reading(np.array([0, 1, 0, 1, 2, 3, 3, 2]), window, 0)
    later = reading(np.array([0, 2, 2, 0, 3, 1, 3, 1]), window, 4)
    at = [open_groups(now, later, place, 2, 8) for place in (0, 2, 4, 6)]
    assert at == [[0, 1, 2], [0, 1, 2, 3], [2, 3, 0], [2, 3, 0]]


def test_the_bound_of_memory_counts_two_windows():
    sizes = np.array([3, 9, 5, 7])
    assert [most_open_bytes(sizes, window) for window in (1, 2)] == [9 + 7, 9 + 7 + 5 + 3]


# --- the stream, without files -------------------------------------------------------------------


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
    needed = set(stream.payload.group[list(map(int, first))].tolist())
    assert set(stream.payload.reads) <= needed | stream._open.keys()  # type: ignore[attr-defined]
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
        assert sum(map(payload.bytes_of, stream._open)) <= stream.window_bytes
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
