"""Pair shards x the metrics they lack -> score shards, in one pass over the images.

The pass runs on over the borders of shards: a shard's files are written as soon as all of its rows
are computed, and meanwhile the next shards are read, decoded and embedded.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from data.artifacts.latents import KIND as LATENTS
from data.artifacts.parquet_io import write_table
from data.pairs.schema import PairSource, image_key
from data.prefetch import prefetch
from label.metrics import Panel
from label.metrics.preprocessing import ProcessedImage
from label.scoring.batching import Batch
from label.scoring.claims import Claims
from label.scoring.decode_pool import DecodePool
from label.scoring.score_sets import FACTS, ScoreSets, ShardTask
from label.scoring.scoring_pass import Clock, Row, ScoringPass
from label.scoring.shard_builder import ShardBuilder
from label.scoring.vae_encoder import LatentFile, VaeEncoder

READ_ROWS = 64
"""Pairs read at a time; with 170 kB an image, 20 MB."""
READ_AHEAD = 3
"""Such reads that lie ready."""
STRETCH = 4096
"""Pairs scored together. Public pair files have about 1 500."""
OPEN = 4
"""Stretches that may wait for full batches; with these, 16 384 pairs' embeddings are in memory."""


@dataclass(frozen=True, slots=True)
class ScoringTools:
    """What scores shards, apart from the shards."""

    pairs: PairSource
    panel: Panel
    sets: ScoreSets
    claims: Claims
    decoder: DecodePool
    batch: Batch
    clock: Clock
    cache_bytes: int = 0
    encoder: VaeEncoder | None = None
    """Makes latents, where they are asked."""


def score_shards(works: Iterable[ShardTask], tools: ScoringTools) -> int:
    """Score pair shards by the metrics they lack and write their files; how many pairs."""
    with (
        ThreadPoolExecutor(1) as background,
        prefetch(_read(works, tools.pairs), READ_AHEAD) as parts,
    ):
        desk = ShardScorer(tools, background)
        timed = _timed(parts, tools.clock)
        while (part := _next(timed, desk)) is not None:
            desk.take(part)
        desk.finish()
    return desk.num_pairs


def _next(parts: "Iterator[PairBatch]", desk: "ShardScorer") -> "PairBatch | None":
    """The next part; a pair file that cannot be read costs none of the shards before it."""
    try:
        return next(parts, None)
    except ValueError:
        desk.save()
        raise


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Some pairs of a shard, as their source gives them."""

    work: ShardTask
    pairs: list[dict[str, Any]]
    keys: list[tuple[bytes, bytes]]
    """The `image_key`s of both images."""
    last: bool = False


def _read(works: Iterable[ShardTask], pairs: PairSource) -> Iterator[PairBatch]:
    """All pairs of all shards; a shard ends with an empty part."""
    for work in works:
        for table in pairs.read(work.shard, batch_rows=READ_ROWS):
            rows = table.to_pylist()
            keys = [
                (image_key(row["image_0"] or b""), image_key(row["image_1"] or b"")) for row in rows
            ]
            yield PairBatch(work, rows, keys)
        yield PairBatch(work, [], [], last=True)


@dataclass(slots=True)
class Chunk:
    """Pairs that are scored together."""

    rows: list[tuple[Row, Row]] = field(default_factory=list)
    end: int | None = None
    """When this many rows are computed, all of these are; None while there is room."""


@dataclass(slots=True)
class _Shard:
    """A shard in work."""

    work: ShardTask
    columns: ShardBuilder
    fingerprint: Future[dict[str, str]] | None
    """Of the pair file, where it is to be noted."""
    latents: LatentFile | None
    stretches: deque[Chunk] = field(default_factory=deque)
    is_read: bool = False


class ShardScorer:
    """The shards in work: pairs come in, files go out."""

    def __init__(self, tools: ScoringTools, background: ThreadPoolExecutor) -> None:
        self._tools, self._background = tools, background
        self._shards: deque[_Shard] = deque()
        self._names: list[str] | None = None
        self._pass: ScoringPass | None = None
        self.num_pairs = 0

    def take(self, part: PairBatch) -> None:
        """Give pairs to the pass, and write what is computed."""
        shard, scoring = self._shard(part.work), self._pass
        assert scoring is not None
        for pair, keys in zip(part.pairs, part.keys, strict=True):
            shard.columns.read(pair, keys)
            stretch, prompt = self._room(shard), pair["prompt"] or ""
            left = scoring.add(pair["image_0"] or b"", prompt, keys[0])
            right = scoring.add(pair["image_1"] or b"", prompt, keys[1])
            stretch.rows.append((left, right))
        self.num_pairs += len(part.pairs)
        self._tools.claims.advance(part.work.shard.index, len(part.pairs))
        shard.is_read = part.last
        if part.last and shard.stretches and shard.stretches[-1].end is None:
            self._close(shard.stretches[-1])
        self._settle()

    def finish(self) -> None:
        """Compute and write everything that was taken."""
        self.save()
        assert not self._shards

    def save(self) -> None:
        """Compute what was taken, and write the shards that were taken whole."""
        if self._pass is not None:
            self._pass.flush()
            self._settle()

    def _shard(self, work: ShardTask) -> _Shard:
        """The shard in work, opened where it is new."""
        if self._shards and self._shards[-1].work == work:
            return self._shards[-1]
        tools, names = self._tools, [name for name in work.sets if name != FACTS]
        encoder = tools.encoder if LATENTS in names else None
        if names != self._names:
            self.finish()
            panel = tools.panel.only([name for name in names if name != LATENTS])
            self._pass = panel.start(
                tools.decoder, tools.batch, tools.clock, tools.cache_bytes, encoder
            )
            self._names = names
        latents = fingerprint = None
        if encoder is not None:
            path = tools.sets.path(LATENTS, work.shard)
            latents = LatentFile(path, encoder, tools.sets.settings(LATENTS, work.shard))
        if FACTS in work.sets:  # hashing releases the GIL and reads what we read
            fingerprint = self._background.submit(tools.pairs.fingerprint, work.shard)
        self._shards.append(_Shard(work, ShardBuilder(work.shard), fingerprint, latents))
        return self._shards[-1]

    def _room(self, shard: _Shard) -> Chunk:
        """The stretch that takes the next pair."""
        if shard.stretches and len(shard.stretches[-1].rows) == STRETCH:
            self._close(shard.stretches[-1])
            self._settle()
        if not shard.stretches or shard.stretches[-1].end is not None:
            shard.stretches.append(Chunk())
        return shard.stretches[-1]

    def _close(self, stretch: Chunk) -> None:
        scoring = self._pass
        assert scoring is not None
        stretch.end = scoring.given
        waiting = sum(len(shard.stretches) for shard in self._shards)
        if waiting > OPEN or not scoring.steady:
            scoring.flush()
        if not scoring.steady:  # then batches must not depend on what this process did before
            scoring.forget()

    def _settle(self) -> None:
        """Score the stretches that are computed, write the shards that are whole."""
        scoring = self._pass
        assert scoring is not None
        done = scoring.computed
        for shard in self._shards:
            while shard.stretches and (end := shard.stretches[0].end) is not None and end <= done:
                self._score(shard, shard.stretches.popleft().rows)
        while self._shards and self._shards[0].is_read and not self._shards[0].stretches:
            self._write(self._shards.popleft())

    def _score(self, shard: _Shard, rows: list[tuple[Row, Row]]) -> None:
        assert self._pass is not None
        images = [(_found(left), _found(right)) for left, right in rows]
        scores = self._pass.scores([row for pair in rows for row in pair])
        shard.columns.found(
            images, {name: values.reshape(-1, 2) for name, values in scores.items()}
        )
        if shard.latents:
            known = shard.columns.last(len(rows))
            with self._tools.clock.measure("write"):
                shard.latents.add(known, [(left.image, right.image) for left, right in rows])

    def _write(self, shard: _Shard) -> None:
        sets, work = self._tools.sets, shard.work
        with self._tools.clock.measure("write"):
            for name in work.sets:
                if name == LATENTS:
                    assert shard.latents
                    shard.latents.close()
                    continue
                settings = sets.settings(name, work.shard)
                if name == FACTS and shard.fingerprint is not None:
                    settings["source"] |= shard.fingerprint.result()
                table = shard.columns.facts() if name == FACTS else shard.columns.scores(name)
                write_table(sets.path(name, work.shard), table, settings)
        self._tools.claims.release(work.shard.index)


def _found(row: Row) -> ProcessedImage:
    found = row.image.found
    assert found is not None
    return found


def _timed(items: Iterator[PairBatch], clock: Clock) -> Iterator[PairBatch]:
    """The parts, with the time to get each of them counted as reading."""
    while True:
        with clock.measure("read"):
            item = next(items, None)
        if item is None:
            return
        yield item
