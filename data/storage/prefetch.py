"""Prefetching: items made by a thread before their consumer wants them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_S = 0.1
"""Seconds between two looks whether the consumer is still there."""


@contextmanager
def prefetch(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Yield the same items, up to `depth` of them prepared by a thread while others are in use.

    Reading and decoding release the GIL, so they run beside the use of the items. An error of the
    thread is raised where its item would have come. The thread ends with the block. With depth 0
    there is no thread.
    """
    if depth == 0:
        yield iter(items)
        return
    ready: Queue[Any] = Queue(depth)
    stop = Event()
    thread = Thread(target=_fill, args=(items, ready, stop), daemon=True)
    thread.start()
    try:
        yield _drain(ready)
    finally:
        stop.set()
        thread.join()


class _End(Exception):  # noqa: N818 - it is no error
    """There are no more items."""


def _fill(items: Iterable[T], ready: "Queue[Any]", stop: Event) -> None:
    try:
        for item in items:
            if not _put(ready, item, stop):
                return
        raise _End  # noqa: TRY301
    except BaseException as end:  # passed on, whatever it is
        _put(ready, end, stop)


def _put(ready: "Queue[Any]", item: object, stop: Event) -> bool:
    """Offer an item until it is taken or the consumer has left."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=LOOK_S)
        except Full:
            continue
        return True
    return False


def _drain(ready: "Queue[Any]") -> Iterator[Any]:
    while True:
        item = ready.get()
        if isinstance(item, _End):
            return
        if isinstance(item, BaseException):
            raise item
        yield item
