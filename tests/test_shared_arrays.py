"""Arrays that a process writes and another reads."""

import gc
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from label.metrics.preprocessing import ImageTransform, ResizeMode, process_image
from label.scoring import decode_processes
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool, Decoding
from label.scoring.decode_processes import SPARE_SLOTS
from label.scoring.panel import Panel
from label.scoring.scoring_pass import DECODE_IMAGES
from label.scoring.shared_arrays import SLOT_BYTES, ArrayWriter, SharedArrays
from tests import helpers_label as tiny
from tests.helpers_ranks import context

ARRAYS = [
    np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    np.zeros((0, 0, 3), np.uint8),
    np.linspace(0, 1, 27, dtype=np.float32).reshape(3, 3, 3),
]


def test_arrays_are_read_where_they_were_written():
    shared = SharedArrays(2)
    writer, slots = ArrayWriter(shared.path), [shared.take(), shared.take()]
    packed = [
        writer.pack(arrays, slot.start)
        for slot, arrays in zip(slots, (ARRAYS, ARRAYS[::-1]), strict=True)
    ]
    for slot, arrays, content in zip(slots, (ARRAYS, ARRAYS[::-1]), packed, strict=True):
        read = content.unpack(slot)
        assert [(one.dtype, one.shape, one.tobytes()) for one in read] == [
            (one.dtype, one.shape, one.tobytes()) for one in arrays
        ]
        assert all(np.shares_memory(one, slot.memory) for one in read if one.size)


def test_a_slot_is_free_again_when_its_last_array_is_gone():
    shared = SharedArrays(1)
    slot = shared.take()
    assert shared.take() is None
    first, *others = ArrayWriter(shared.path).pack(ARRAYS, slot.start).unpack(slot)
    del others, slot
    gc.collect()
    assert shared.take() is None
    del first
    assert shared.take() is not None


def test_the_slot_that_was_used_last_is_used_first():
    """So memory is taken for as many slots as are in use at a time."""
    shared = SharedArrays(3)
    first, second = shared.take(), shared.take()
    start = first.start
    del first
    assert shared.take().start == start
    assert second.start != start


def test_arrays_that_need_more_room_than_a_slot_has_are_not_written():
    shared = SharedArrays(1)
    writer = ArrayWriter(shared.path)
    large = np.zeros(SLOT_BYTES, np.uint8)
    assert writer.pack([large], 0) is not None
    assert writer.pack([large, np.zeros(1, np.uint8)], 0) is None
    assert writer.pack([], 0).spans == []


IMAGE, WAY = tiny.image(1), ImageTransform(ResizeMode.CROP, 8)


@pytest.mark.slow
def test_a_chunk_that_fails_holds_no_slot():
    context()  # the processes' server is that of the other tests
    with DecodePool(1, most_threads=0) as decoder:
        shared = decoder._processes._shared
        with pytest.raises(ValueError, match="height and width must be > 0"):
            decoder.submit([(IMAGE, [ImageTransform(ResizeMode.CROP, -8)])]).wait()
        gc.collect()
        slots = [shared.take() for _ in range(decoder.prefetch + SPARE_SLOTS)]
    assert None not in slots


class Hidden(SharedArrays):
    """As where /proc is not there."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.path = "/nowhere"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in the run", "in its processes"])
def test_arrays_go_through_the_pipe_where_memory_cannot_be_shared(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if where == "in the run":  # as after `ulimit -f`
        resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT_BYTES, limits[1]))
    else:
        monkeypatch.setattr(decode_processes, "SharedArrays", Hidden)
    try:
        with DecodePool(1, most_threads=0) as decoder:
            (image,) = decoder.submit([(IMAGE, [WAY])]).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert np.array_equal(image.arrays[WAY], process_image(IMAGE, [WAY]).arrays[WAY])


class Instant(DecodePool):
    """Decodes at once, and would let 64 chunks lie ready."""

    def __init__(self) -> None:
        super().__init__(0)
        self.prefetch, self.num_chunks = 64, 0

    def submit(self, chunk: Any) -> Decoding:
        self.num_chunks += 1
        return super().submit(chunk)


def test_the_networks_begin_with_the_first_images(tmp_path: Path):
    """Not only when decoding is as far ahead as it may be; meanwhile decoding gets ahead."""
    tiny.build_weights(tmp_path)
    specs = {name: spec for name, spec in tiny.specs(tmp_path).items() if name == "clip"}
    panel, decoder = Panel.load(specs, torch.device("cpu")), Instant()
    scoring = panel.start(decoder, Batch(DECODE_IMAGES, is_checked=False))
    begun: list[int] = []
    (batcher,) = scoring._images.values()
    forward = batcher.forward
    batcher.forward = lambda images: begun.append(decoder.num_chunks) or forward(images)
    for number in range(10 * DECODE_IMAGES):
        scoring.add(tiny.image(number), "a prompt")
    assert begun == [1, 3, 5, 7, 9]
