"""Forward passes of one fixed shape, whose results are copied without making the device wait.

When every batch has the same size (the last is padded), the result for an image does not depend on
its neighbours. Nothing guarantees this: a library may add in another order for another place in
the batch (measured: five images on two threads differ by 7e-7, multiples of eight do not). So each
network's first batch is computed twice, with every input at another place, unless the set is so
small that its chunks are better computed one by one (`batch_for`).
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.devices import is_out_of_memory

EVEN = 8
"""In batches of multiples of this, results have been seen to depend on nothing but their input."""
CHECK_BATCHES = 2
"""What the check costs at most, in batches of a network."""
CHECKED_FROM = 16
"""Batches from which on the check is always worth it: an eighth of the work at most."""

Inputs = TypeVar("Inputs", np.ndarray, list[Any])


@dataclass(slots=True)
class Batch:
    """Size of a forward pass; shared by all networks of a run, halved when memory runs out."""

    size: int
    is_checked: bool = True
    """Whether each network's first batch is computed twice, to fill `even`; a pass that shares
    nothing with others needs no check."""
    even: dict[tuple[Hashable, int], bool] = field(default_factory=dict)
    """(network, size) -> whether the check showed that the place in the batch does not matter."""


def batch_for(chunks: Sequence[int], most: int) -> Batch:
    """The batch for a pair set whose chunks have these many images, and whether it is checked.

    It follows from the set alone, not from what is left of it, so that every rank and every restart
    agrees. A set smaller than a batch costs about its own size. The check lets chunks share batches
    and embeddings; it costs two batches, so a set of few is computed chunk by chunk without it.
    """
    largest = max(chunks, default=1)
    even = largest if largest < EVEN else -(-largest // EVEN) * EVEN
    size = max(1, min(most, even))
    alone = sum(-(-images // size) for images in chunks)
    together = -(-sum(chunks) // size)
    worth = together >= CHECKED_FROM or together + CHECK_BATCHES < alone
    return Batch(size, is_checked=len(chunks) > 1 and worth)


def run_halving(forward: Callable[[Inputs], Tensor], inputs: Inputs, batch: Batch) -> Tensor:
    """Run `forward` on full batches; when device memory runs out, halve the batch and continue.

    Raises:
        ValueError: Not even one fits.
    """
    parts: list[Tensor] = []
    done = 0
    while done < len(inputs):
        work = inputs[done : done + batch.size]
        try:
            part = forward(pad_batch(work, batch.size))[: len(work)]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch.size == 1:
                raise ValueError(
                    "the device has no memory for a single image; use label.device=cpu, a "
                    "smaller model, or close what else runs there"
                ) from error
            part = None
        if part is None:  # retried outside `except`, which keeps the failed tensors alive
            batch.size //= 2
            torch.cuda.empty_cache()
        else:
            parts.append(part)
            done += len(part)
    return torch.cat(parts)


def pad_batch(inputs: Inputs, size: int) -> Inputs:
    """The inputs, padded to `size` with copies of the last one."""
    missing = size - len(inputs)
    if isinstance(inputs, np.ndarray):
        return np.concatenate([inputs, np.repeat(inputs[-1:], missing, axis=0)])
    return inputs + inputs[-1:] * missing


class AsyncCopy:
    """A tensor that is being copied from the device."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.is_cuda:  # into pinned memory, behind the kernels that make it
            stream = torch.cuda.current_stream(values.device)  # not the current device's, if other
            values = values.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)
        self._values = values

    def wait(self) -> np.ndarray:
        """Wait for the values and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.numpy()


@dataclass(frozen=True, slots=True)
class Request:
    """An input of a network, and where its result is stored."""

    row: int
    """The row that needs it."""
    content: Any
    store: dict[Any, Any]
    key: Any


@dataclass(slots=True)
class Batcher:
    """Collects inputs of a network until a batch is full; results arrive one batch later."""

    network: Hashable
    """Identifies what `forward` runs."""
    forward: Callable[[list[Any]], Tensor]
    batch: Batch
    part: str = "embed"
    """The part of the pass that its time counts for."""
    waiting: deque[Request] = field(default_factory=deque)
    copies: deque[tuple[list[Request], AsyncCopy]] = field(default_factory=deque)

    @property
    def steady(self) -> bool:
        """Whether the check showed that a result depends on nothing but its own input."""
        return self.batch.even.get((self.network, self.batch.size), False)

    @property
    def oldest(self) -> int | None:
        """The first row that waits for a result."""
        if self.copies:
            return self.copies[0][0][0].row
        return self.waiting[0].row if self.waiting else None

    def run_full(self) -> None:
        """Compute while there are full batches."""
        while len(self.waiting) >= self.batch.size:
            self._run()

    def flush(self) -> None:
        """Compute everything and wait for it."""
        while self.waiting:
            self._run()
        while self.copies:
            self._store()

    def _run(self) -> None:
        work = [self.waiting.popleft() for _ in range(min(self.batch.size, len(self.waiting)))]
        contents = [one.content for one in work]
        values = run_halving(self.forward, contents, self.batch)
        if self.batch.is_checked and (self.network, self.batch.size) not in self.batch.even:
            self._check(contents, values)
        self.copies.append((work, AsyncCopy(values)))
        if len(self.copies) > 1:
            self._store()

    def _check(self, contents: list[Any], values: Tensor) -> None:
        size = self.batch.size
        inputs = pad_batch(contents[:size], size)
        if len(contents) < size:  # the padded places count, too
            values = run_halving(self.forward, inputs, self.batch)
        moved = run_halving(self.forward, inputs[-1:] + inputs[:-1], self.batch).roll(-1, dims=0)
        if self.batch.size == size:
            same = torch.equal(values[:size].nan_to_num(), moved.nan_to_num())
            self.batch.even[self.network, size] = same

    def _store(self) -> None:
        work, copy = self.copies.popleft()
        for one, value in zip(work, copy.wait(), strict=True):
            one.store[one.key] = value.copy()  # a view would keep the whole batch alive
