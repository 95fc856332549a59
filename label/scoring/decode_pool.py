"""Worker processes that decode and resize images ahead of the device.

A worker imports PIL and numpy, never torch. It leaves when its parent dies, however that happened.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from label.metrics.preprocessing import ImageTransform, ProcessedImage, process_images

AHEAD = 8
"""Chunks a worker that may be decoded or waiting: what bounds the memory for images."""
LOOK_S = 5.0
"""Seconds that an answer is waited for between two looks at the workers."""


class DecodePool:
    """Prepares chunks of images, in worker processes or (`workers=0`) in this one.

    Processes are spawned, not forked: a fork of a process that uses CUDA or threads may hang.
    """

    def __init__(self, workers: int) -> None:
        self._executor: Executor = (
            ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start)
            if workers
            else _Here()
        )
        self.ahead = AHEAD * workers

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def submit(
        self, chunk: Sequence[tuple[bytes, Sequence[ImageTransform]]]
    ) -> Callable[[], list[ProcessedImage]]:
        """Begin to prepare a chunk; call the answer to wait for it."""
        with _explained():  # a broken pool takes no more work
            future = self._executor.submit(process_images, chunk)
        return lambda: self._result(future)

    def _result(self, future: Future[list[ProcessedImage]]) -> list[ProcessedImage]:
        with _explained():
            while True:
                try:
                    return future.result(LOOK_S)
                except TimeoutError:
                    if future.done():  # the work's own error
                        raise
                    _unblock(self._executor)


def _unblock(executor: Executor) -> None:
    """End a pool that waits for ever for a worker killed in the middle of an answer.

    The pool notices a dead worker, unless that one had begun to send: then it reads on, and the
    others wait for the dead one's lock. Without writers the reading ends, and the pool says so.
    """
    pool: Any = executor
    workers = list((getattr(pool, "_processes", None) or {}).values())
    if all(worker.is_alive() for worker in workers):
        return
    for worker in workers:
        worker.kill()
    pool._result_queue._writer.close()


@contextmanager
def _explained() -> Iterator[None]:
    """Says what to do about a process that is gone or has no memory.

    Raises:
        ValueError: Instead of the pool's errors.
    """
    try:
        yield
    except (BrokenProcessPool, MemoryError) as error:
        killed = isinstance(error, BrokenProcessPool)
        happened = "was killed, most likely for" if killed else "failed for"
        raise ValueError(
            f"a process that decodes images {happened} want of memory; lower label.workers "
            "(0 decodes in the main process) and run the same command again: what is finished is "
            "kept"
        ) from error


class _Here(Executor):
    """Does the work at once in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def _start() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
