"""Workers that decode and resize images before the networks need them.

Pillow, numpy and scipy release the GIL where they work on pixels, so a few threads decode as many
images a second as processes do, for less CPU time (`python -m benchmarks.decode`). Many wait for
the GIL in between, and so does the thread that launches the networks: on 16 cores, 16 threads
decoded 363 images a second and 16 processes 607 (benchmarks/results/gpu-day-nvidia-h200.md).
"""

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

from label.metrics.preprocessing import ProcessedImage, Transform, process_images

PREFETCHED_CHUNKS = 8
"""Chunks per worker that may be decoded or waiting: what bounds the memory for images."""
MOST_PREFETCHED = 64
"""Chunks of all workers together."""
MOST_THREADS = 4
"""More workers than this are processes."""
MOST_DECODERS = 16
"""Workers of a process that labels, if no setting says more."""

Chunk = Sequence[tuple[bytes, Sequence[Transform]]]


class DecodePool:
    """Prepares chunks of images in threads or processes, or, with `workers=0`, in the caller's.

    `most_threads` is up to how many workers are threads; processes take a second to start.
    """

    def __init__(self, workers: int, most_threads: int = MOST_THREADS) -> None:
        self._executor = _executor(workers, most_threads) if workers else None
        self.prefetch = min(PREFETCHED_CHUNKS * workers, MOST_PREFETCHED)
        """How many chunks may be decoded or waiting."""

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def submit(self, chunk: Chunk) -> "Decoding":
        """Begin to prepare a chunk.

        Raises:
            ValueError: There is not enough memory, or a process was killed; says what to do.
        """
        if self._executor is None:
            future: Future[list[ProcessedImage]] = Future()
            future.set_result(_process(chunk))
            return Decoding(future)
        try:
            return Decoding(self._executor.submit(_process, chunk))
        except BrokenProcessPool as error:
            raise ValueError(KILLED) from error


@dataclass(frozen=True, slots=True)
class Decoding:
    """A chunk that is being prepared."""

    future: Future[list[ProcessedImage]]

    @property
    def is_ready(self) -> bool:
        """Whether it is prepared, so that nobody has to wait."""
        return self.future.done()

    def wait(self) -> list[ProcessedImage]:
        """Wait for the images.

        Raises:
            ValueError: There was not enough memory, or a process was killed; says what to do.
        """
        try:
            return self.future.result()
        except BrokenProcessPool as error:
            raise ValueError(KILLED) from error


KILLED = (
    "a process that decodes images was killed, most likely because the machine's memory ran out; "
    "lower label.workers, then rerun the same command: finished work is kept"
)


def _executor(workers: int, most_threads: int) -> Executor:
    if workers <= most_threads:
        return ThreadPoolExecutor(workers, "decode")
    # Not forks of this process, whose threads and GPU a fork cannot use.
    return ProcessPoolExecutor(workers, get_context("forkserver"), _be_worker)


def _process(chunk: Chunk) -> list[ProcessedImage]:
    """Prepare a chunk.

    Raises:
        ValueError: There is not enough memory; says what to do.
    """
    try:
        return process_images(chunk)
    except MemoryError as error:
        raise ValueError(
            "not enough memory to decode an image; lower label.workers, then rerun the same "
            "command: finished work is kept"
        ) from error


def _be_worker() -> None:
    """Leave an interrupt to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
