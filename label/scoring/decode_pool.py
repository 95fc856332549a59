"""Workers that decode and resize images before the networks need them.

Pillow, numpy and scipy release the GIL where they work on pixels, so a few threads decode as many
images a second as processes do, for less CPU time (`python -m benchmarks.decode`). Many wait for
the GIL in between, and so does the thread that launches the networks: on 16 cores, 16 threads
decoded 363 images a second and 16 processes 607 (benchmarks/results/gpu-day-nvidia-h200.md).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from label.metrics.preprocessing import ProcessedImage, process_images
from label.scoring.decode_processes import Chunk, DecodeProcesses

PREFETCHED_CHUNKS = 8
"""Chunks per worker that may be decoded or waiting: what bounds the memory for images."""
MOST_PREFETCHED = 64
"""Chunks of all workers together."""
MOST_THREADS = 4
"""More workers than this are processes."""
MOST_DECODERS = 16
"""Workers of a process that labels, if no setting says more."""


class DecodePool:
    """Prepares chunks of images in threads or processes, or, with `workers=0`, in the caller's.

    `most_threads` is up to how many workers are threads; processes take a second to start.
    """

    def __init__(self, workers: int, most_threads: int = MOST_THREADS) -> None:
        self.prefetch = min(PREFETCHED_CHUNKS * workers, MOST_PREFETCHED)
        """How many chunks may be decoded or waiting."""
        self._threads, self._processes = None, None
        if workers > most_threads:
            self._processes = DecodeProcesses(workers, _process, self.prefetch)
        elif workers:
            self._threads = ThreadPoolExecutor(workers, "decode")

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes:
            self._processes.shutdown()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    def submit(self, chunk: Chunk) -> "Decoding":
        """Begin to prepare a chunk.

        Raises:
            ValueError: There is not enough memory, or a process was killed or could not start; says
                what to do.
        """
        if self._threads:
            return Decoding(self._threads.submit(_process, chunk))
        if self._processes:
            try:
                return Decoding(self._processes.submit(chunk))
            except (BrokenProcessPool, OSError, EOFError) as error:  # OSError: while one started
                raise ValueError(KILLED) from error
        images: Future[list[ProcessedImage]] = Future()
        images.set_result(_process(chunk))
        return Decoding(images)


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
    "a process that decodes images was killed or could not start, most likely because the "
    "machine's memory ran out; lower label.workers, then rerun the same command: finished work is "
    "kept"
)


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
