"""Threads that decode and resize images before the networks need them.

Pillow, numpy and scipy release the GIL where they work on pixels, so threads decode as many images
a second as processes do, for less CPU time (`python -m benchmarks.decode`).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from label.metrics.preprocessing import ProcessedImage, Transform, process_images

PREFETCHED_CHUNKS = 8
"""Chunks per worker that may be decoded or waiting: what bounds the memory for images."""

Chunk = Sequence[tuple[bytes, Sequence[Transform]]]


class DecodePool:
    """Prepares chunks of images in threads, or, with `workers=0`, in the calling thread."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, "decode") if workers else None
        self.prefetch = PREFETCHED_CHUNKS * workers
        """How many chunks may be decoded or waiting."""

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def submit(self, chunk: Chunk) -> Callable[[], list[ProcessedImage]]:
        """Begin to prepare a chunk; call the result to wait for it."""
        if self._threads is not None:
            return self._threads.submit(_process, chunk).result
        images = _process(chunk)
        return lambda: images


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
