"""The order of pairs, and when row groups are read for it; pure functions.

An epoch's order is a function of (label rows, seed, epoch): row groups are permuted, the rows of
`window` row groups are permuted together, the result is dealt in global batches and cut to whole
ones. A position is two numbers, so a resumed run repeats no work and no pair, and any number of
processes sees the same global batches.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True, slots=True)
class Position:
    """The position in the data: an epoch, and the whole global batches done in it."""

    epoch: int = 0
    batches: int = 0


def windows_of(group: np.ndarray, window: int, key: str) -> np.ndarray:
    """Return the window that visits each pair, from 0; `group` is each pair's row group."""
    counts = np.bincount(group)
    present, place = np.flatnonzero(counts), np.zeros(len(counts), np.int64)
    permuted = present[np.argsort(_bits(len(present), f"{key}/groups"), kind="stable")]
    place[permuted] = np.arange(len(present))
    window_of: np.ndarray = place[group] // window
    return window_of


def epoch_order(
    group: np.ndarray, window: int, key: str, among: np.ndarray | None = None
) -> np.ndarray:
    """The order in which an epoch visits the pairs, as indices; a pure function of its arguments.

    `group` is each pair's row group. Row groups are permuted; pairs are permuted among those whose
    row groups fall into the same `window` of consecutive ones, so that few are open at a time.
    `among` are the pairs that are wanted, ascending; None wants all.
    """
    windows, bits = windows_of(group, window, key), _bits(len(group), f"{key}/rows")
    if among is None:
        return np.lexsort((bits, windows))
    return among[np.lexsort((bits[among], windows[among]))]


def _bits(length: int, key: str) -> np.ndarray:
    """Return the random bits of a key, whose stream NumPy promises to keep; sorted they permute."""
    seed = int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "little")
    return np.random.PCG64(seed).random_raw(length)


def deal(order: np.ndarray, batch: int, rank: int, world_size: int) -> np.ndarray:
    """Return this rank's pairs of every whole global batch of an epoch, (batch, pair).

    Ranks are disjoint, equal, and together the batch. Each takes the pairs of one stretch of the
    files (indices count pairs as they lie there), so that it reads its part of the row groups and
    not all of them; it visits them in the order's order.
    """
    whole = order[: len(order) // batch * batch].reshape(-1, batch)
    if world_size == 1:
        return whole
    mine = batch // world_size
    here = np.argsort(whole, axis=1)[:, rank * mine : (rank + 1) * mine]
    return np.take_along_axis(whole, np.sort(here, axis=1), axis=1)


@dataclass(frozen=True, slots=True)
class Reading:
    """When a rank needs which row group in an epoch; times are indices into its order of pairs."""

    groups: np.ndarray
    """The row groups that it needs, in the order of `due`."""
    due: np.ndarray
    """When to begin reading each, so that windows are read while the one before is used up; below
    0 in the epoch before, whose last window is this epoch's one before."""
    first: np.ndarray
    last: np.ndarray
    """When each is needed for the first and the last time."""

    def due_at(self, place: int, count: int) -> list[int]:
        """The row groups needed for `count` pairs from a place on, and those due at that place."""
        due = (self.due <= place) | (self.first < place + count)
        groups: list[int] = self.groups[due & (place <= self.last)].tolist()
        return groups


def reading(group: np.ndarray, window: np.ndarray, lead: int) -> Reading:
    """Plan the reading of an epoch, from `group` and `window` of each pair in this rank's order.

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


def open_groups(now: Reading, later: Reading, place: int, count: int, length: int) -> list[int]:
    """The row groups to have in memory, or to read, for `count` pairs from a place on.

    `now` and `later` are the readings of two consecutive epochs, of which the first reads `length`
    pairs on this rank. The second's first windows are read while the first's last one is used up,
    so a place in this epoch is also one before the next, counted from its beginning:

        this epoch   |---- window ----|---- window ----|
        place        0                   ^ place       length
        next epoch                       ^ place - length (< 0)  |---- window ----|
        memory                        [ used up here, and read for the next window ]
    """
    groups = [*now.due_at(place, count), *later.due_at(place - length, count)]
    return list(dict.fromkeys(groups))


def most_open_bytes(sizes: np.ndarray, window: int) -> int:
    """An upper bound of the bytes of row groups in memory at a time.

    `sizes` are the bytes of each row group. Two windows are open, since the next one is read while
    one is used up. They may have the largest row groups, so the bound is the size of that many.
    """
    return int(np.sort(sizes)[::-1][: 2 * window].sum())
