"""Work ahead of its consumer, in a thread; and copies to the device that nobody waits for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from queue import Full, Queue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class _Failed(Generic[Item]):
    """Carries an exception from the producing thread to the consumer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextmanager
def ahead(items: Iterator[Item], depth: int) -> Iterator[Iterator[Item]]:
    """An iterator over an endless `items` that is kept up to `depth` ahead by a thread.

    Decoding and reading release the GIL, so they run beside the step. An error of the producer is
    raised where its item would have come. With depth 0 nothing runs ahead.
    """
    if depth == 0:
        yield items
        return
    queue: Queue[Item | _Failed[Item]] = Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, queue, stop), name="ahead", daemon=True)
    thread.start()
    try:
        yield _drain(queue)
    finally:
        stop.set()
        thread.join()


def _fill(
    items: Iterator[Item], queue: "Queue[Item | _Failed[Item]]", stop: threading.Event
) -> None:
    try:
        for item in items:
            _put(queue, item, stop)
            if stop.is_set():
                return
    except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
        _put(queue, _Failed(error), stop)


def _put(
    queue: "Queue[Item | _Failed[Item]]", item: Item | _Failed[Item], stop: threading.Event
) -> None:
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.1)  # wakes now and then to see whether it should stop
        except Full:
            continue
        return


def _drain(queue: "Queue[Item | _Failed[Item]]") -> Iterator[Item]:
    while True:
        item = queue.get()
        if isinstance(item, _Failed):
            raise item.error
        yield item


# --- to the device -------------------------------------------------------------------------------


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU fetches it when it comes to it; the host does not wait."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already: no second copy


def pinned(item: Any, device: torch.device) -> Any:
    """A dataclass whose tensors a GPU can fetch by itself; on a CPU it is the same object.

    It copies, so it is work for the thread that reads ahead.
    """
    return item if device.type != "cuda" else _mapped(item, lambda tensor: tensor.pin_memory())


def moved(item: Any, device: torch.device, stay: tuple[str, ...] = ()) -> Any:
    """A dataclass with its tensors on the device, but for those named in `stay`."""
    return _mapped(item, lambda tensor: onto(tensor, device), stay)


def _mapped(item: Any, change: Any, stay: tuple[str, ...] = ()) -> Any:
    values = {f.name: getattr(item, f.name) for f in fields(item) if f.name not in stay}
    return replace(item, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})
