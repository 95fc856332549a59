"""Arrays that a process writes and another reads."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch

from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool, Decoding
from label.scoring.panel import Panel
from label.scoring.scoring_pass import DECODE_IMAGES
from label.scoring.shared_arrays import SLOT_BYTES, ArrayWriter, SharedArrays
from tests import helpers_label as tiny

ARRAYS = [
    np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
    np.zeros((0, 0, 3), np.uint8),
    np.linspace(0, 1, 27, dtype=np.float32).reshape(3, 3, 3),
]


def test_arrays_are_read_as_they_were_written():
    shared = SharedArrays(2)
    slots = [shared.take(), shared.take()]
    writer = ArrayWriter(shared.path)
    for slot, arrays in zip(slots, (ARRAYS, ARRAYS[::-1]), strict=True):
        places = writer.write(slot, arrays)
        read = shared.arrays(slot, places)
        assert [(one.dtype, one.shape, one.tobytes()) for one in read] == [
            (one.dtype, one.shape, one.tobytes()) for one in arrays
        ]
        assert all(one.base is not None for one in read)
    shared.close()


def test_a_slot_is_free_again_when_its_last_array_is_gone():
    shared = SharedArrays(1)
    slot = shared.take()
    assert shared.take() is None
    first, *others = shared.arrays(slot, ArrayWriter(shared.path).write(slot, ARRAYS))
    del others
    gc.collect()
    assert shared.take() is None
    del first
    assert shared.take() == slot


def test_arrays_that_need_more_room_than_a_slot_has_are_not_written():
    shared = SharedArrays(1)
    writer = ArrayWriter(shared.path)
    large = np.broadcast_to(np.zeros(1, np.uint8), (SLOT_BYTES,))
    assert writer.write(0, [large]) is not None
    assert writer.write(0, [large, np.zeros(1, np.uint8)]) is None
    assert writer.write(0, []) == []


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
