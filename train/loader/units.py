"""The order of pairs of several sizes; pure functions.

The pairs of a size are a stream without end: those of the first epoch in its order, then those of
the next. A unit is `unit` consecutive pairs of such a stream, so all of one size, and a global
batch is some units. An epoch has those units that are complete by its end, in the order in which
they become complete, and of them whole batches; what is left belongs to the next epoch:

    size A   a a a a a a a|a a a a a a a      | epoch     units of 4: aaaa, bbbb, aaaa, ...
    size B       b b b    |    b b b b                    the third has pairs of both epochs

So no pair is left out or comes twice, and all of this is computed from (label rows, seed, epoch),
whatever happened before. An epoch reads each pair where its own order visits it, also a pair that
is left from the epoch before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from train.loader.order import epoch_order


@dataclass(frozen=True, slots=True)
class Batches:
    """The global batches of an epoch."""

    pairs: np.ndarray
    """Pairs as indices, (batch, pair); units lie side by side."""
    epochs: np.ndarray
    """The epoch of which each pair is a visit: this one, or one before."""


@dataclass(frozen=True, slots=True)
class UnitOrder:
    """What decides the order of pairs of several sizes."""

    group: np.ndarray
    """Each pair's row group."""
    size: np.ndarray
    """Each pair's size, as a number from 0; none is left out."""
    window: int
    unit: int
    """Pairs in a unit."""
    per_batch: int
    """Units in a global batch."""
    key: Callable[[int], str]
    """Epoch -> the key of its order."""

    def units_before(self, epoch: int) -> np.ndarray:
        """How many units of each size belong to the epochs before this one.

        They are whole batches. Of the complete units those are left over which would be complete
        last if each size's pairs were spread evenly over the epochs.
        """
        counts = np.bincount(self.size)
        complete = counts * epoch // self.unit
        left_over = int(complete.sum()) % self.per_batch
        numbers = complete - np.arange(left_over)[:, None]  # the last units of each size, from 1
        numbers = np.maximum(numbers, 0)
        sizes = np.broadcast_to(np.arange(len(counts)), numbers.shape).ravel()
        last = np.lexsort((sizes, (numbers / counts).ravel()))[len(sizes) - left_over :]
        before: np.ndarray = complete - np.bincount(sizes[last], minlength=len(counts))
        return before

    def num_batches(self, epoch: int) -> int:
        """How many global batches an epoch has."""
        units = self.units_before(epoch + 1) - self.units_before(epoch)
        return int(units.sum()) // self.per_batch

    def batches(self, epoch: int, place: np.ndarray) -> Batches:
        """The global batches of an epoch, which visits each pair at a place."""
        pairs, epochs = self._units(epoch)
        by_completion = np.argsort(place[pairs].max(axis=1), kind="stable")
        shape = -1, self.per_batch * self.unit
        return Batches(pairs[by_completion].reshape(shape), epochs[by_completion].reshape(shape))

    def _units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of an epoch's units, (unit, pair), and the epochs of which they are visits."""
        counts = np.bincount(self.size)
        first, end = (self.unit * self.units_before(one) for one in (epoch, epoch + 1))
        parts = []
        for visit in range(int((first // counts).min()), epoch + 1):
            is_wanted = (counts * visit < end) & (first < counts * (visit + 1))
            among = np.flatnonzero(is_wanted[self.size])
            pairs = epoch_order(self.group, self.window, self.key(visit), among)
            pairs = pairs[np.argsort(self.size[pairs], kind="stable")]
            size = self.size[pairs]
            number = np.arange(len(pairs)) - np.searchsorted(size, size) + counts[size] * visit
            inside = (first[size] <= number) & (number < end[size])
            epochs = np.full(len(pairs), visit)
            parts.append(np.stack([size, number, pairs, epochs])[:, inside])
        every = np.concatenate(parts, axis=1)
        _, _, pairs, epochs = every[:, np.lexsort((every[1], every[0]))]
        return pairs.reshape(-1, self.unit), epochs.reshape(-1, self.unit)


def deal_units(
    batches: Batches,
    size: np.ndarray,
    place: np.ndarray,
    micro_batch: int,
    rank: int,
    world_size: int,
) -> Batches:
    """This rank's micro-batches of every global batch, (micro-batch, pair), each of one size.

    Ranks are disjoint, equal, and together the batch. Of each batch they take micro-batches that
    lie near each other in the files, so that a rank reads its part of the row groups and not all of
    them. A rank begins with those that its reading completes first.
    """
    pairs, epochs = batches.pairs, batches.epochs
    if world_size > 1:
        by_size = np.lexsort((pairs, size[pairs]), axis=1)
        pairs, epochs = (np.take_along_axis(one, by_size, 1) for one in (pairs, epochs))
        each = len(pairs), -1, micro_batch
        pairs, epochs = pairs.reshape(each), epochs.reshape(each)
        mine = pairs.shape[1] // world_size
        here = np.argsort(pairs[:, :, 0], axis=1, kind="stable")[:, rank * mine :][:, :mine]
        pairs, epochs = (np.take_along_axis(one, here[..., None], 1) for one in (pairs, epochs))
        by_completion = np.argsort(place[pairs].max(axis=2), axis=1, kind="stable")[..., None]
        pairs, epochs = (np.take_along_axis(one, by_completion, 1) for one in (pairs, epochs))
    return Batches(pairs.reshape(-1, micro_batch), epochs.reshape(-1, micro_batch))
