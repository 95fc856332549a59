"""Processes that prepare images, and write the arrays where the labelling process reads them."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process

from label.metrics.preprocessing import ProcessedImage, Transform
from label.scoring.shared_arrays import ArrayWriter, Place, SharedArrays

Chunk = Sequence[tuple[bytes, Sequence[Transform]]]
Prepare = Callable[[Chunk], list[ProcessedImage]]
SPARE_SLOTS = 32
"""For chunks that wait for a full batch of a network, besides those that are being prepared."""


class DecodeProcesses:
    """Runs `prepare`, a function of a module, in processes; `ahead` chunks or more at a time."""

    def __init__(self, workers: int, prepare: Prepare, ahead: int) -> None:
        self._prepare = prepare
        self._shared = SharedArrays(ahead + SPARE_SLOTS) if SharedArrays.is_supported() else None
        path = self._shared.path if self._shared else None
        # Not forks of this process, whose threads and GPU a fork cannot use.
        context = get_context("forkserver")
        self.executor = ProcessPoolExecutor(workers, context, _be_worker, (path,))

    def submit(self, chunk: Chunk) -> Future[list[ProcessedImage]]:
        """Begin to prepare a chunk.

        Raises:
            BrokenProcessPool: A process was killed.
        """
        slot = self._shared.take() if self._shared else None
        images: Future[list[ProcessedImage]] = Future()
        sent = self.executor.submit(_prepare, self._prepare, chunk, slot)
        sent.add_done_callback(partial(self._receive, images, slot))
        return images

    def shutdown(self) -> None:
        """Begin no more chunks, and end the processes."""
        self.executor.shutdown(cancel_futures=True)
        if self._shared:
            self._shared.close()

    def _receive(
        self, images: Future[list[ProcessedImage]], slot: int | None, sent: "Future[_Sent]"
    ) -> None:
        """Give the images the arrays that were not sent with them."""
        if sent.cancelled():
            images.cancel()
        elif error := sent.exception():
            images.set_exception(error)
        else:
            images.set_result(self._whole(sent.result(), slot))

    def _whole(self, sent: "_Sent", slot: int | None) -> list[ProcessedImage]:
        if slot is None or self._shared is None:
            return sent.images
        arrays = iter(self._shared.arrays(slot, sent.places or ()))
        if sent.places is None:
            return sent.images
        return [
            replace(image, arrays={way: next(arrays) for way in ways})
            for image, ways in zip(sent.images, sent.ways, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a process sends through its pipe."""

    images: list[ProcessedImage]
    """With their arrays, if these have no places."""
    ways: list[tuple[Transform, ...]]
    """The ways in which each image was prepared."""
    places: list[Place] | None
    """Those of all arrays, one after another."""


# --- in a process --------------------------------------------------------------------------------

_writer: ArrayWriter | None = None


def _be_worker(path: str | None) -> None:
    """Leave an interrupt to the parent, end with it even if it is killed, and open its memory."""
    global _writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _writer = ArrayWriter(path) if path else None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(prepare: Prepare, chunk: Chunk, slot: int | None) -> _Sent:
    images, places = prepare(chunk), None
    if slot is not None and _writer is not None:
        places = _writer.write(slot, [array for one in images for array in one.arrays.values()])
    ways = [tuple(image.arrays) for image in images]
    if places is not None:
        images = [replace(image, arrays={}) for image in images]
    return _Sent(images, ways, places)
