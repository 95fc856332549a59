"""Processes that prepare images, and write the arrays where the labelling process reads them."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver, get_context, parent_process, resource_tracker

from label.metrics.preprocessing import ProcessedImage, Transform
from label.scoring.shared_arrays import ArrayWriter, Packed, SharedArrays, Slot

Chunk = Sequence[tuple[bytes, Sequence[Transform]]]
Prepare = Callable[[Chunk], list[ProcessedImage]]
Sent = Packed | list[ProcessedImage]
"""What a process sends through its pipe: with the arrays where there is no room for them."""
SPARE_SLOTS = 32
"""For chunks that wait for a full batch of a network, besides those that are being prepared."""


class DecodeProcesses:
    """Runs `prepare`, a function of a module, in processes.

    `ahead` is how many chunks are prepared or lie ready; more may, but their arrays are sent.
    """

    def __init__(self, workers: int, prepare: Prepare, ahead: int) -> None:
        self._prepare = prepare
        self._shared: SharedArrays | None = None
        with suppress(OSError):  # then the arrays go through the pipe
            self._shared = SharedArrays(ahead + SPARE_SLOTS)
        path = self._shared.path if self._shared else None
        _start_server()
        # Not forks of this process, whose threads and GPU a fork cannot use.
        context = get_context("forkserver")
        self.executor = ProcessPoolExecutor(workers, context, _be_worker, (path,))

    def submit(self, chunk: Chunk) -> Future[list[ProcessedImage]]:
        """Begin to prepare a chunk.

        Raises:
            BrokenProcessPool: A process was killed.
        """
        slot = self._shared.take() if self._shared else None
        start = slot.start if slot else None
        images: Future[list[ProcessedImage]] = Future()
        sent = self.executor.submit(_prepare, self._prepare, chunk, start)
        sent.add_done_callback(partial(_receive, images, slot))
        return images

    def shutdown(self) -> None:
        """Begin no more chunks, and end the processes."""
        self.executor.shutdown(cancel_futures=True)
        if self._shared:
            self._shared.close()


def _start_server() -> None:
    """Start what the processes are forked from, so that an interrupt never meets one.

    They ignore it as soon as they can, but one that is still importing would print its end.
    """
    resource_tracker.ensure_running()  # starting it would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(images: Future[list[ProcessedImage]], slot: Slot | None, sent: Future[Sent]) -> None:
    """Give the images the arrays that were not sent with them; hold the slot until then."""
    try:
        result = sent.result()
        images.set_result(result.unpack(slot) if isinstance(result, Packed) else result)
    except Exception as error:  # whatever it is, somebody waits for it
        images.set_exception(error)


# --- in a process --------------------------------------------------------------------------------

_writer: ArrayWriter | None = None


def _be_worker(path: str | None) -> None:
    """Leave an interrupt to the parent, end with it even if it is killed, and open its memory."""
    global _writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if path:
        with suppress(OSError):  # then the arrays go through the pipe
            _writer = ArrayWriter(path)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(prepare: Prepare, chunk: Chunk, start: int | None) -> Sent:
    images = prepare(chunk)
    packed = _writer.pack(images, start) if _writer and start is not None else None
    return packed or images
