"""Memory into which processes write arrays that another process reads, without copying.

Arrays sent through a pipe cost the reader a millisecond for each image, in 64 KiB pieces, each of
which waits for the GIL that the thread holds which launches the networks.
"""

import mmap
import os
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

SLOT_BYTES = 2**26
"""Room for the arrays of a chunk; memory that is not written to takes none."""
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for arrays, which is free again when nothing refers to its memory any more."""

    start: int
    """Its first byte in the file."""
    memory: np.ndarray
    """All of it; arrays in it refer to this one."""


@dataclass(frozen=True, slots=True)
class Packed:
    """An object the arrays of which are in a slot."""

    pickled: bytes
    """The object without them."""
    spans: list[tuple[int, int]]
    """Their first bytes in the slot, and the ends."""

    def unpack(self, slot: Slot | None) -> Any:
        """The object, with arrays that are where they were written."""
        assert slot is not None
        arrays = [slot.memory[start:end] for start, end in self.spans]
        return pickle.loads(self.pickled, buffers=arrays)


class SharedArrays:
    """The reader's side: memory in slots, in a file without a name."""

    def __init__(self, slots: int) -> None:
        """Reserve the addresses; memory is taken as it is written.

        Raises:
            OSError: The system has no such files (Linux has), or a limit forbids one of this size.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no files without a name")
        file = os.memfd_create("arrays")
        self.close = weakref.finalize(self, os.close, file)
        """Lets no more writers open it; arrays stay."""
        os.ftruncate(file, slots * SLOT_BYTES)
        self._memory = mmap.mmap(file, slots * SLOT_BYTES)
        self._free = [number * SLOT_BYTES for number in range(slots)]
        self.path = f"/proc/{os.getpid()}/fd/{file}"
        """Where the writers find it."""

    def take(self) -> Slot | None:
        """A free slot, if there is one: the last that was used, whose memory is there already."""
        if not self._free:
            return None
        start = self._free.pop()
        memory = np.frombuffer(self._memory, np.uint8, SLOT_BYTES, start)
        weakref.finalize(memory, self._free.append, start).atexit = False
        return Slot(start, memory)


class ArrayWriter:
    """A writer's side."""

    def __init__(self, path: str) -> None:
        """Open what a reader has reserved.

        Raises:
            OSError: This process may not.
        """
        file = os.open(path, os.O_RDWR)
        try:
            self._memory = mmap.mmap(file, os.fstat(file).st_size)
        finally:
            os.close(file)

    def pack(self, content: Any, start: int) -> Packed | None:
        """Put an object's arrays into the slot that starts there; None if they need more room."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
        spans: list[tuple[int, int]] = []
        end = 0
        for array in map(pickle.PickleBuffer.raw, buffers):
            first = -(-end // ALIGNMENT) * ALIGNMENT
            end = first + array.nbytes
            if end > SLOT_BYTES:
                return None
            self._memory[start + first : start + end] = array
            spans.append((first, end))
        return Packed(pickled, spans)
