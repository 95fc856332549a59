"""The order of pairs, computed and not stored; pure functions.

An epoch's order is a function of (label rows, seed, epoch): row groups are permuted, the rows of
`window` row groups are permuted together, the result is dealt in global batches and cut to whole
ones. A position is two numbers, so going on costs nothing and repeats nothing, and every number of
processes sees the same global batches.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True, slots=True)
class Position:
    """Where training stands in the data: whole global batches done in an epoch."""

    epoch: int = 0
    batches: int = 0


def windows_of(group: np.ndarray, window: int, key: str) -> np.ndarray:
    """The window that visits each pair, counted from 0; `group` is each pair's row group."""
    counts = np.bincount(group)
    present, place = np.flatnonzero(counts), np.zeros(len(counts), np.int64)
    place[present[_permutation(len(present), f"{key}/groups")]] = np.arange(len(present))
    found: np.ndarray = place[group] // window
    return found


def epoch_order(group: np.ndarray, window: int, key: str) -> np.ndarray:
    """The order in which an epoch visits the pairs, as indices; a pure function of its arguments.

    `group` is each pair's row group. Row groups are permuted; pairs are permuted among those whose
    row groups fall into the same `window` of consecutive ones, so that few are open at a time.
    """
    mixed = _permutation(len(group), f"{key}/rows")
    return mixed[np.argsort(windows_of(group, window, key)[mixed], kind="stable")]


def _permutation(length: int, key: str) -> np.ndarray:
    """A permutation named by its key; sorts raw bits, whose stream NumPy promises not to change."""
    seed = int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


def deal(order: np.ndarray, batch: int, rank: int, world: int) -> np.ndarray:
    """This rank's pairs of every whole global batch of an epoch, (batch, pair).

    Ranks are disjoint, equal, and together the batch. Each takes the pairs of one stretch of the
    files (indices count pairs as they lie there), so that it reads its part of the row groups and
    not all of them; it visits them in the order's order.
    """
    whole = order[: len(order) // batch * batch].reshape(-1, batch)
    if world == 1:
        return whole
    mine = batch // world
    here = np.argsort(whole, axis=1)[:, rank * mine : (rank + 1) * mine]
    return np.take_along_axis(whole, np.sort(here, axis=1), axis=1)


@dataclass(frozen=True, slots=True)
class Reading:
    """When a rank needs which row group in an epoch; times are places in its order of pairs."""

    groups: np.ndarray
    """The row groups that it needs, in the order of `due`."""
    due: np.ndarray
    """When to begin reading each, so that windows are read while the one before is used up; below
    0 in the epoch before, whose last window is this epoch's one before."""
    first: np.ndarray
    last: np.ndarray
    """When each is needed for the first and the last time."""

    def due_at(self, place: int, count: int) -> list[int]:
        """The row groups to have for `count` pairs from a place on, or to begin to read there."""
        due = (self.due <= place) | (self.first < place + count)
        found: list[int] = self.groups[due & (place <= self.last)].tolist()
        return found


def reading(group: np.ndarray, window: np.ndarray, lead: int) -> Reading:
    """The reading of an epoch: `group` and `window` of each pair in this rank's order.

    Row groups of a window become due one after the other, evenly spread over the window before;
    those of the first window over the `lead` pairs before the epoch.
    """
    uses, present = np.arange(len(group)), np.flatnonzero(np.bincount(group))
    first, last = np.zeros((2, int(present[-1]) + 1), np.int64)
    first[group[::-1]], last[group] = uses[::-1], uses  # of equal indices the last one counts
    present = present[np.argsort(first[present])]
    first, last = first[present], last[present]
    new = np.diff(window, prepend=-1) != 0
    starts, which = np.flatnonzero(new), np.cumsum(new) - 1
    belongs = which[first]  # the window of each row group, counted among this rank's
    number = np.arange(len(first)) - np.searchsorted(belongs, belongs)
    count = np.bincount(belongs)[belongs]
    before = np.concatenate([[-lead], starts])
    due = before[belongs] + (before[belongs + 1] - before[belongs]) * number // count
    return Reading(present, due, first, last)
