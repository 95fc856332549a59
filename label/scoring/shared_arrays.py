"""Memory into which processes write arrays that another process reads, without copying.

Arrays sent through a pipe cost the reader a millisecond for each image, in 64 KiB pieces, each of
which waits for the GIL that the thread holds which launches the networks.
"""

import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SLOT_BYTES = 2**26
"""Room for the arrays of a chunk; memory that is not written to takes none."""
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Place:
    """An array's place in the memory."""

    start: int
    shape: tuple[int, ...]
    dtype: str


class SharedArrays:
    """The reader's side: slots, each free again when the last array in it is gone."""

    def __init__(self, slots: int) -> None:
        self._file = os.memfd_create("arrays")
        os.ftruncate(self._file, slots * SLOT_BYTES)
        self._memory = mmap.mmap(self._file, slots * SLOT_BYTES)
        self._free = deque(range(slots))
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        """Where the writers find it."""

    @staticmethod
    def is_supported() -> bool:
        """Whether the system has memory that is a file without a name (Linux)."""
        return hasattr(os, "memfd_create")

    def take(self) -> int | None:
        """A free slot, if there is one."""
        return self._free.popleft() if self._free else None

    def arrays(self, slot: int, places: Sequence[Place]) -> list[np.ndarray]:
        """What a writer has put into a slot, which is free again when the last of it is gone."""
        whole = np.frombuffer(self._memory, np.uint8, SLOT_BYTES, slot * SLOT_BYTES)
        weakref.finalize(whole, self._free.append, slot).atexit = False
        return [_array(whole, place) for place in places]

    def close(self) -> None:
        """Let no more writers open it; arrays stay."""
        os.close(self._file)


class ArrayWriter:
    """A writer's side."""

    def __init__(self, path: str) -> None:
        file = os.open(path, os.O_RDWR)
        try:
            self._memory = mmap.mmap(file, os.fstat(file).st_size)
        finally:
            os.close(file)

    def write(self, slot: int, arrays: Sequence[np.ndarray]) -> list[Place] | None:
        """Put arrays into a slot; None if they need more room than it has."""
        starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)])
        if starts[-1] > SLOT_BYTES:
            return None
        whole = np.frombuffer(self._memory, np.uint8, SLOT_BYTES, slot * SLOT_BYTES)
        places = [
            Place(int(start), array.shape, array.dtype.str)
            for start, array in zip(starts, arrays, strict=False)
        ]
        for place, array in zip(places, arrays, strict=True):
            _array(whole, place)[...] = array
        return places


def _array(whole: np.ndarray, place: Place) -> np.ndarray:
    dtype = np.dtype(place.dtype)
    size = int(np.prod(place.shape)) * dtype.itemsize
    return whole[place.start : place.start + size].view(dtype).reshape(place.shape)
