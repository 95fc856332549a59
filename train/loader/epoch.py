"""A rank's part of an epoch: which row it reads when, and which of them each micro-batch takes."""

from dataclasses import dataclass

import numpy as np

from train.loader.order import Reading, reading
from train.loader.units import Batches


@dataclass(frozen=True, slots=True)
class Epoch:
    """A rank's part of an epoch, from some global batch on."""

    number: int
    batches: Batches
    """Its micro-batches, (micro-batch, pair)."""
    visits: np.ndarray
    """Its pairs in the order in which their rows are read."""
    visit: np.ndarray
    """The place in that order of each pair of each micro-batch."""
    window: np.ndarray
    """The window of each visit."""
    reading: Reading

    def chunk(self, visit: int, end: int, most: int) -> range:
        """The next visits, at most so many before an end, that lie in one window."""
        in_window = int(np.searchsorted(self.window, self.window[visit], side="right"))
        return range(visit, min(end, visit + most, in_window))

    @property
    def last_window(self) -> int:
        """Number of visits in the last window."""
        return int((self.window == self.window[-1]).sum())


def plan_epoch(
    number: int,
    batches: Batches,
    place: np.ndarray,
    window: np.ndarray,
    group: np.ndarray,
    lead: int,
) -> Epoch:
    """Plan the reading of a rank's micro-batches.

    `place`, `window` and `group` are of all pairs: where the epoch's order has them, the window
    that visits them, and their row group. The first row groups are read during the `lead` visits
    before the epoch.
    """
    slots = np.argsort(place[batches.pairs.ravel()], kind="stable")
    visits, visit = batches.pairs.ravel()[slots], np.empty_like(slots)
    visit[slots] = np.arange(len(slots))
    by_batch = visit.reshape(batches.pairs.shape)
    plan = reading(group[visits], window[visits], lead)
    return Epoch(number, batches, visits, by_batch, window[visits], plan)
