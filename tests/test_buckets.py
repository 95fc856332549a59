"""Aspect buckets: which size fits a pair, the order of units, and the stream of several sizes."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.images import Size
from data.models.buckets import SDXL, best_sizes, fraction_kept, free_sizes
from tests.helpers_stream import SIZES, Case
from train.config import BucketKind, BucketSpec, TrainSpec
from train.loader.crops import describe_cuts
from train.loader.loader import PairBatch
from train.loader.order import Position, epoch_order
from train.loader.units import UnitOrder

# --- sizes ---------------------------------------------------------------------------------------


def test_sdxls_sizes_are_of_one_area():
    assert len(set(SDXL)) == 40
    for size in SDXL:
        assert size.width % 64 == size.height % 64 == 0
        assert 0.9 * 1024**2 < size.width * size.height <= 1.01 * 1024**2
        assert 0.25 <= size.width / size.height <= 4


@given(st.integers(1, 16), st.sampled_from([8, 32, 64]), st.floats(1, 4))
def test_free_sizes_keep_to_area_step_and_aspect(steps: int, step: int, aspect: float):
    side = steps * step
    sizes = free_sizes(side, step, aspect)
    assert Size(side, side) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {Size(size.height, size.width) for size in sizes} == set(sizes)
    for size in sizes:
        short, long = sorted((size.width, size.height))
        assert short % step == long % step == 0
        assert long <= aspect * short
        assert short * long <= side * side < short * (long + step)


def test_free_sizes_of_512():
    names = [str(size) for size in free_sizes(512, 64, 2.0)]
    assert names == ["384x640", "448x576", "512x512", "576x448", "640x384"]


def test_a_pair_gets_the_size_that_cuts_least_of_the_worse_image():
    sizes = free_sizes(512, 64, 2.0)
    images = np.array(
        [
            [[640, 384], [1280, 768]],  # height and width
            [[100, 100], [100, 100]],
            [[512, 1024], [1024, 512]],  # the square keeps half of either
            [[600, 400], [700, 700]],  # 2:3 and 1:1
        ]
    )
    best = [str(sizes[index]) for index in best_sizes(images, sizes)]
    assert best == ["384x640", "512x512", "512x512", "448x576"]


@given(st.lists(st.integers(1, 4000), min_size=4, max_size=4))
def test_no_other_size_keeps_more_of_the_worse_image(lengths: list[int]):
    images = np.array(lengths).reshape(1, 2, 2)
    kept = [fraction_kept(images, size).min() for size in SDXL]
    assert kept[best_sizes(images, SDXL)[0]] == max(kept)


# --- the order of units --------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> UnitOrder:
    """Any sizes, row groups, units and batches of at most all pairs."""
    size = np.array(draw(st.lists(st.sampled_from([0, 0, 0, 1, 1, 2]), min_size=4, max_size=60)))
    _, size = np.unique(size, return_inverse=True)
    unit = draw(st.integers(1, 4))
    per_batch = draw(st.integers(1, len(size) // unit))
    group = np.sort(np.array(draw(st.lists(st.integers(0, 7), min_size=len(size),
                                           max_size=len(size)))))  # fmt: skip
    seed = draw(st.integers(0, 3))
    window = draw(st.integers(1, 3))
    return UnitOrder(group, size, window, unit, per_batch, lambda epoch: f"{seed}/{epoch}")


def visits(order: UnitOrder, epoch: int) -> list[tuple[int, int]]:
    """The epochs and pairs of an epoch's batches, one after the other."""
    place = np.argsort(epoch_order(order.group, order.window, order.key(epoch)))
    batches = order.batches(epoch, place)
    assert len(batches.pairs) == order.num_batches(epoch)
    assert batches.pairs.shape[1] == order.unit * order.per_batch
    units = order.size[batches.pairs].reshape(-1, order.unit)
    assert (units == units[:, :1]).all()
    return list(zip(batches.epochs.ravel().tolist(), batches.pairs.ravel().tolist(), strict=True))


@settings(max_examples=40)
@given(orders(), st.integers(1, 6))
def test_each_size_is_a_stream_of_which_nothing_is_left_out_or_comes_twice(
    order: UnitOrder, epochs: int
):
    dealt = [visit for epoch in range(epochs) for visit in visits(order, epoch)]
    assert len(set(dealt)) == len(dealt)
    for size, units in enumerate(order.units_before(epochs).tolist()):
        stream = [
            (epoch, int(pair))
            for epoch in range(epochs)
            for pair in epoch_order(order.group, order.window, order.key(epoch))
            if order.size[pair] == size
        ]
        here = [visit for visit in dealt if order.size[visit[1]] == size]
        assert set(here) == set(stream[: units * order.unit])
    waiting = epochs * len(order.size) - len(dealt)
    sizes = int(order.size.max()) + 1
    assert waiting < order.unit * order.per_batch + sizes * order.unit


@given(orders(), st.integers(0, 10**6))
def test_a_far_epoch_is_computed_from_its_number(order: UnitOrder, epoch: int):
    now, later = order.units_before(epoch), order.units_before(epoch + 1)
    assert (now <= later).all()
    assert now.sum() % order.per_batch == 0
    assert {visit for visit, _ in visits(order, epoch)} <= set(range(epoch + 1))


# --- the stream ----------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Pairs of up to three sizes; a batch of some units of some micro-batches, for some ranks."""
    aspects = tuple(draw(st.lists(st.integers(0, 2), min_size=2, max_size=12)))
    world, each, micro = (draw(st.integers(1, most)) for most in (3, 3, 2))
    parts = draw(st.sampled_from([n for n in range(1, 10) if world * each % n == 0]))
    groups = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    missing = max(0, world * each * micro - sum(groups))
    return Case((*groups, 1 + missing), 5, draw(st.integers(1, 3)), world, each, micro,
                draw(st.integers(0, 3)), (*aspects, 1), micro * parts)  # fmt: skip


def batches(case: Case, count: int, rank: int = 0, at: Position | None = None) -> list[PairBatch]:
    return list(islice(case.stream(rank).batches(at or Position()), count * case.each))


def named(batch: PairBatch) -> list[tuple[int, str]]:
    return list(zip(batch.epochs, batch.pair_ids, strict=True))


def together(case: Case, count: int) -> list[Counter[tuple[int, str]]]:
    """The pairs of each global batch, put together from all ranks."""
    whole: list[Counter[tuple[int, str]]] = [Counter() for _ in range(count)]
    sizes = case.stream().size
    for rank in range(case.world):
        mine = batches(case, count, rank)
        for number, one in enumerate(mine):
            assert len(one.pair_ids) == case.micro
            assert {SIZES[sizes[int(pair)]] for pair in one.pair_ids} == {one.cut}
            whole[number // case.each].update(named(one))
    assert {one.total() for one in whole} == {case.batch}
    assert max(sum(whole, Counter()).values()) == 1
    return whole


@settings(max_examples=15)
@given(cases())
def test_any_number_of_ranks_shares_the_same_global_batches(case: Case):
    alone = replace(case, world=1, each=case.each * case.world)
    assert together(case, 6) == together(alone, 6)


@settings(max_examples=15)
@given(cases(), st.data())
def test_resuming_anywhere_gives_the_rest(case: Case, data: st.DataObject):
    rank, done = data.draw(st.integers(0, case.world - 1)), data.draw(st.integers(0, 8))
    stream, at = case.stream(rank), Position()
    for _ in range(done):
        at = stream.after(at)
    straight = [named(one) for one in batches(case, 9, rank)]
    rest = batches(case, 9 - done, rank, at)
    assert [named(one) for one in rest] == straight[done * case.each :]


@settings(max_examples=15)
@given(cases(), st.data())
def test_memory_stays_within_what_is_said(case: Case, data: st.DataObject):
    stream = case.stream(data.draw(st.integers(0, case.world - 1)))
    payload, (sizes, window) = stream.payload, (stream.pairs.groups, case.window)
    bytes_of = dict.fromkeys(range(len(sizes)), 0)
    for unit in np.unique(payload.group).tolist():
        pair = int(np.argmax(payload.group == unit))
        bytes_of[int(stream.pairs.group[pair])] += payload.bytes_of(unit)
    two_windows = sum(sorted(bytes_of.values())[-2 * window :])
    for _ in islice(stream.batches(Position()), 12 * case.each):
        assert sum(map(payload.bytes_of, stream._open)) <= two_windows <= stream.window_bytes
        assert payload.waiting <= stream.most_waiting  # type: ignore[attr-defined]


# --- settings and what is said -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings_", "resolution", "message"),
    [
        ("none", {"step": 32}, 512, "train.buckets.step=32 has no meaning for .*kind=none"),
        ("none", {"unit": 4}, 512, "train.buckets.unit=4 has no meaning"),
        ("sdxl", {"aspect": 3.0}, 1024, "train.buckets.aspect=3 has no meaning for .*kind=sdxl"),
        ("free", {"step": 4}, 512, "train.buckets.step=4; it must be at least 8"),
        ("free", {"aspect": 0.5}, 512, r"train.buckets.aspect=0.5; it must be in \[1, 32\]"),
        ("free", {"unit": 0}, 512, "train.buckets.unit=0; it must be at least 1"),
        ("sdxl", {}, 512, "for model.resolution=1024, but it is 512; choose buckets=free"),
        ("free", {}, 500, "model.resolution=500 is no multiple of train.buckets.step=64"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kind: str, settings_, resolution: int, message: str):
    with pytest.raises(ValueError, match=message):
        BucketSpec(kind=BucketKind(kind), **settings_).sizes(resolution)


def test_units_are_whole_micro_batches_and_parts_of_a_batch():
    free = BucketSpec(kind=BucketKind.free)
    TrainSpec(batch=16, micro_batch=4, buckets=free)
    with pytest.raises(ValueError, match=r"train.batch=12 is no multiple of train.buckets.unit=8"):
        TrainSpec(batch=12, micro_batch=4, buckets=free)
    TrainSpec(batch=16, micro_batch=16, buckets=free)  # micro-batches will be units
    with pytest.raises(ValueError, match=r"buckets.unit=8 is no multiple of train.micro_batch=3"):
        TrainSpec(batch=24, micro_batch=3, buckets=free)


def test_a_run_says_what_is_cut_and_scaled():
    """Three pairs of 512x512 and 1024x512 each: the square cuts half of the second kind."""
    widths = [512, 512, 512, 1024]
    table = pa.table(dict.fromkeys(("height_0", "height_1"), [512] * 4)
                     | dict.fromkeys(("width_0", "width_1"), widths))  # fmt: skip
    square, free = (Size(256, 256),), free_sizes(256, 64, 2.0)
    assert describe_cuts(table, square, free, 8) == [
        "squares of 256x256: 12.5% of the images' area cut, sides scaled by 0.50; with "
        "buckets=free 4.2% would be cut (docs/buckets.md)"
    ]
    first, second, third = describe_cuts(table, free, square, 2)
    assert first.startswith("buckets: 2 of 3 sizes have pairs (256x256 75%, 320x192 25%) · 4.2% of")
    assert second == (
        "as squares of 256x256 they would have 12.5% of the images' area cut, sides scaled by 0.50"
    )
    assert third == (
        "1 pairs of 1 sizes fill no unit of 2 in an epoch; they wait until later ones complete it"
    )
