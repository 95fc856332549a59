"""Pair shards x the metrics they lack -> score shards, in one pass over the images.

The pass does not stop at the border of a shard: while the rows of one are still being computed,
the next are read, decoded and embedded. A shard's files are written as soon as all of its rows are
computed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from data.artifacts.latents import KIND as LATENTS
from data.artifacts.parquet_io import write_table
from data.images import size_of
from data.pairs.schema import PairShard, PairSource, image_key
from data.storage.prefetch import prefetch
from label.metrics.preprocessing import Cut, ProcessedImage
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.panel import Panel
from label.scoring.score_sets import FACTS, ScoreSets, ShardTask
from label.scoring.scoring_pass import Clock, Row
from label.scoring.shard_builder import ShardBuilder
from label.scoring.vae_encoder import LatentFile, VaeEncoder

READ_ROWS = 64
"""Pairs read at a time; with 170 kB an image, 20 MB."""
PREFETCHED_READS = 3
"""How many such reads may lie ready."""
CHUNK_PAIRS = 4096
"""Pairs scored together. Public pair files have about 1 500."""
OPEN_CHUNKS = 4
"""Chunks that may wait for full batches; with these, 16 384 pairs' embeddings are in memory."""


def chunk_images(shards: Iterable[PairShard]) -> list[int]:
    """Images of each chunk of these shards, each pair's two counted apart."""
    return [
        2 * min(CHUNK_PAIRS, shard.rows - first)
        for shard in shards
        for first in range(0, shard.rows, CHUNK_PAIRS)
    ]


def _ignore(_: PairShard, __: int) -> None:
    """Nobody counts the pairs."""


@dataclass(frozen=True, slots=True)
class ScoringTools:
    """What scores shards, apart from the shards."""

    pairs: PairSource
    panel: Panel
    sets: ScoreSets
    decoder: DecodePool
    batch: Batch
    clock: Clock
    cache_bytes: int = 0
    encoder: VaeEncoder | None = None
    """Makes latents, where they are wanted."""
    on_read: Callable[[PairShard, int], None] = _ignore
    """Called with a shard and the number of its pairs that were read since the last call."""


def score_shards(tasks: Iterable[ShardTask], tools: ScoringTools) -> int:
    """Score pair shards by the metrics they lack and write their files; return how many pairs.

    Neighbouring shards that lack the same sets share a pass over their images.
    """
    num_pairs = 0
    with (
        ThreadPoolExecutor(1) as background,
        prefetch(_read(tasks, tools.pairs), PREFETCHED_READS) as batches,
    ):
        timed = _timed(batches, tools.clock)
        for names, of_these_sets in groupby(timed, key=lambda batch: batch.task.sets):
            scorer = ShardScorer(tools, names, background)
            for shard in scorer.score(of_these_sets):
                write_shard(shard, tools)
                num_pairs += shard.task.shard.rows
    return num_pairs


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Some pairs of a shard, as their source gives them."""

    task: ShardTask
    pairs: list[dict[str, Any]]
    keys: list[tuple[bytes, bytes]]
    """The `image_key`s of both images."""
    is_last: bool = False


def _read(tasks: Iterable[ShardTask], pairs: PairSource) -> Iterator[PairBatch]:
    """All pairs of all shards; a shard ends with an empty batch."""
    for task in tasks:
        for table in pairs.read(task.shard, batch_rows=READ_ROWS):
            rows = table.to_pylist()
            keys = [
                (image_key(row["image_0"] or b""), image_key(row["image_1"] or b"")) for row in rows
            ]
            yield PairBatch(task, rows, keys)
        yield PairBatch(task, [], [], is_last=True)


def _timed(batches: Iterator[PairBatch], clock: Clock) -> Iterator[PairBatch]:
    """The batches; waiting for each of them counts as reading."""
    while True:
        with clock.measure("read"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@dataclass(slots=True)
class Chunk:
    """Pairs of a shard that are scored together."""

    rows: list[tuple[Row, Row]] = field(default_factory=list)
    end: int | None = None
    """How many rows the pass had been given when the chunk was closed: when that many are
    computed, all of these are. None while the chunk takes pairs."""


@dataclass(slots=True)
class OpenShard:
    """A shard whose pairs are being read and scored."""

    task: ShardTask
    columns: ShardBuilder
    source_hash: Future[dict[str, str]] | None
    """The pair file's fingerprint, where it is to be recorded."""
    latents: LatentFile | None
    chunks: deque[Chunk] = field(default_factory=deque)
    """Pairs that are not scored yet."""
    is_read: bool = False

    @property
    def is_scored(self) -> bool:
        """Whether its files can be written."""
        return self.is_read and not self.chunks


class ShardScorer:
    """Scores shards that lack the same sets, in one pass over their images."""

    def __init__(
        self, tools: ScoringTools, names: tuple[str, ...], background: ThreadPoolExecutor
    ) -> None:
        """`names` are the sets to make; `background` hashes pair files."""
        self._tools, self._background = tools, background
        self._encoder = tools.encoder if LATENTS in names else None
        panel = tools.panel.only([name for name in names if name not in (FACTS, LATENTS)])
        self._pass = panel.start(
            tools.decoder, tools.batch, tools.clock, tools.cache_bytes, self._encoder
        )
        self._shards: deque[OpenShard] = deque()

    def score(self, batches: Iterator[PairBatch]) -> Iterator[OpenShard]:
        """Yield each shard, in order, as soon as all of its pairs are scored.

        A pair file that cannot be read costs none of the shards before it: they are yielded before
        its error is raised.
        """
        error = None
        while True:
            try:
                batch = next(batches, None)
            except ValueError as unreadable:
                batch, error = None, unreadable
            if batch is None:
                break
            self._add(batch)
            yield from self._scored()
        self._pass.flush()
        yield from self._scored()
        if error is not None:
            raise error
        assert not self._shards

    def _add(self, batch: PairBatch) -> None:
        """Give pairs to the pass."""
        shard = self._open_shard(batch.task)
        for pair, keys in zip(batch.pairs, batch.keys, strict=True):
            shard.columns.read(pair, keys)
            chunk, prompt = self._open_chunk(shard), pair["prompt"] or ""
            images = [pair[f"image_{side}"] or b"" for side in (0, 1)]
            cut = self._cut_of(images)
            left, right = (
                self._pass.add(image, prompt, key, cut)
                for image, key in zip(images, keys, strict=True)
            )
            chunk.rows.append((left, right))
        self._tools.on_read(batch.task.shard, len(batch.pairs))
        shard.is_read = batch.is_last
        if batch.is_last and shard.chunks and shard.chunks[-1].end is None:
            self._close(shard.chunks[-1])

    def _cut_of(self, images: Sequence[bytes]) -> Cut | None:
        """How a pair's images are cut for their latents, where these are made."""
        if self._encoder is None:
            return None
        sizes = [size_of(image) if len(self._encoder.cuts) > 1 else None for image in images]
        return self._encoder.cut_of(*sizes)

    def _open_shard(self, task: ShardTask) -> OpenShard:
        """The shard that takes the pairs of a task: the last one, or a new one."""
        if self._shards and self._shards[-1].task == task:
            return self._shards[-1]
        tools, latents, source_hash = self._tools, None, None
        if self._encoder is not None:
            path = tools.sets.path(LATENTS, task.shard)
            latents = LatentFile(path, self._encoder, tools.sets.settings(LATENTS, task.shard))
        if FACTS in task.sets:  # hashing releases the GIL and reads the file that is read anyway
            source_hash = self._background.submit(tools.pairs.fingerprint, task.shard)
        self._shards.append(OpenShard(task, ShardBuilder(task.shard), source_hash, latents))
        return self._shards[-1]

    def _open_chunk(self, shard: OpenShard) -> Chunk:
        """The chunk that takes the shard's next pair."""
        if shard.chunks and len(shard.chunks[-1].rows) == CHUNK_PAIRS:
            self._close(shard.chunks[-1])
            self._score_computed()
        if not shard.chunks or shard.chunks[-1].end is not None:
            shard.chunks.append(Chunk())
        return shard.chunks[-1]

    def _close(self, chunk: Chunk) -> None:
        """Let a chunk take no more pairs; compute what waits where too much waits already."""
        chunk.end = self._pass.num_rows
        waiting = sum(len(shard.chunks) for shard in self._shards)
        if waiting > OPEN_CHUNKS or not self._pass.steady:
            self._pass.flush()
        if not self._pass.steady:  # then batches must not depend on what this process did before
            self._pass.forget()

    def _scored(self) -> Iterator[OpenShard]:
        """Score what is computed and yield the shards that are complete."""
        self._score_computed()
        while self._shards and self._shards[0].is_scored:
            yield self._shards.popleft()

    def _score_computed(self) -> None:
        """Score the chunks all rows of which are computed."""
        computed = self._pass.computed
        for shard in self._shards:
            while shard.chunks and (end := shard.chunks[0].end) is not None and end <= computed:
                self._score(shard, shard.chunks.popleft().rows)

    def _score(self, shard: OpenShard, rows: list[tuple[Row, Row]]) -> None:
        images = [(_processed(left), _processed(right)) for left, right in rows]
        scores = self._pass.scores([row for pair in rows for row in pair])
        shard.columns.score(
            images, {name: values.reshape(-1, 2) for name, values in scores.items()}
        )
        if shard.latents:
            pairs = shard.columns.last(len(rows))
            with self._tools.clock.measure("write"):
                shard.latents.add(pairs, [(left.image, right.image) for left, right in rows])


def _processed(row: Row) -> ProcessedImage:
    processed = row.image.processed
    assert processed is not None
    return processed


def write_shard(shard: OpenShard, tools: ScoringTools) -> None:
    """Write the files of a scored shard; one that another rank has written stays as it is."""
    with tools.clock.measure("write"):
        for name in shard.task.sets:
            if name == LATENTS:
                assert shard.latents
                shard.latents.close()
                continue
            settings = tools.sets.settings(name, shard.task.shard)
            if name == FACTS and shard.source_hash is not None:
                settings["source"] |= shard.source_hash.result()
            table = shard.columns.facts() if name == FACTS else shard.columns.scores(name)
            write_table(
                tools.sets.path(name, shard.task.shard), table, settings, keep_existing=True
            )
