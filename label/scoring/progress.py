"""How many pairs all processes have scored."""

from collections import Counter

from data.pairs.schema import PairShard
from label.scoring.score_sets import ScoreSets


class PairCount:
    """Counts the pairs that are scored: those of finished files, and those this process has read.

    Unfinished shards of other processes count when their files are there.
    """

    def __init__(self, sets: ScoreSets) -> None:
        self._sets = sets
        self._unfinished = {shard.index: shard for shard in sets.shards}
        self._read: Counter[int] = Counter()
        self.total = sum(shard.rows for shard in sets.shards)

    def advance(self, shard: PairShard, rows: int) -> None:
        """Note that this process has read more pairs of a shard."""
        self._read[shard.index] += rows

    def done(self) -> int:
        """Pairs of finished shards, and those that this process has read of the others."""
        self._unfinished = {
            index: shard for index, shard in self._unfinished.items() if self._sets.absent(shard)
        }
        left = sum(
            shard.rows - min(self._read[index], shard.rows)
            for index, shard in self._unfinished.items()
        )
        return self.total - left
