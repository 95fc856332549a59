"""Pairs listed in a text or table, with images named by path or contained in the list itself.

Such files have no row groups and may hold a million pairs, so a list is cut into shards of
`SHARD_ROWS` and these into row groups of `GROUP_ROWS`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from data.pairs.config import PairsSpec
from data.pairs.files import size_of
from data.pairs.image_store import ARCHIVES, NUM_TRIED, ImageStore, open_images
from data.pairs.schema import BLOBS, PAIR, PairShard, image_key
from data.storage import open_store
from data.storage.base import Store
from data.storage.prefetch import prefetch

GROUP_ROWS = 256
"""What is read on its own in stage two; with 170 kB an image, 87 MB."""
SHARD_ROWS = 16 * GROUP_ROWS
PREFETCH = 2
"""Batches of pairs whose images are fetched from an object store before they are wanted."""
NUM_MEASURED = 8
"""Pairs of a row group whose images' sizes are looked up to estimate its bytes."""

LISTED = pa.schema(
    [
        ("prompt", pa.string()),
        ("uid_0", pa.string()),
        ("uid_1", pa.string()),
        ("human", pa.float32()),
        ("generator_0", pa.string()),
        ("generator_1", pa.string()),
        ("image_0", pa.string()),
        ("image_1", pa.string()),
    ]
)
"""A pair as a list gives it: images are paths."""


@runtime_checkable
class Listing(Protocol):
    """The pairs of one file, by number."""

    @property
    def num_rows(self) -> int:
        """Pairs in the file."""

    def rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Consecutive pairs in the columns of `LISTED`; an image is a path, bytes, or None."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """A list without images is small: a hundred bytes a pair."""

    table: pa.Table
    """Has the schema `LISTED`."""

    @property
    def num_rows(self) -> int:
        """Pairs in the file."""
        return int(self.table.num_rows)

    def rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Consecutive pairs in the columns of `LISTED`."""
        rows: list[dict[str, Any]] = self.table.slice(first, count).to_pylist()
        return rows


@dataclass(frozen=True, slots=True)
class ListedPairs:
    """Pairs from lists and images from files."""

    store: Store
    """Where the lists lie."""
    shards: tuple[PairShard, ...]
    listings: Mapping[str, Listing]
    """The list of each file."""
    images: ImageStore

    @property
    def root(self) -> str:
        """The set's folder, or its URL."""
        return self.store.url

    def read(
        self, shard: PairShard, *, images: bool = True, batch_rows: int = 64
    ) -> Iterator[pa.Table]:
        """The shard's pairs in order, `batch_rows` at a time, in the columns of `PAIR`."""
        tables = (
            self._table(shard, start, min(batch_rows, shard.rows - start), start, images)
            for start in range(0, shard.rows, batch_rows)
        )
        depth = PREFETCH if images and self.images.store.remote else 0
        with prefetch(tables, depth) as ready:
            yield from ready

    def row_groups(self, shard: PairShard) -> list[tuple[int, int]]:
        """Rows and bytes of each `GROUP_ROWS`; bytes are estimated from some of the images."""
        starts = range(0, shard.rows, GROUP_ROWS)
        sizes = [min(GROUP_ROWS, shard.rows - start) for start in starts]
        return [
            (rows, self._estimate(shard, start, rows))
            for start, rows in zip(starts, sizes, strict=True)
        ]

    def read_row_group(self, shard: PairShard, group: int) -> pa.Table:
        """One whole row group of the shard, in the columns of `PAIR`; rows count from 0 in it."""
        start = group * GROUP_ROWS
        return self._table(shard, start, min(GROUP_ROWS, shard.rows - start), 0, images=True)

    def _table(
        self, shard: PairShard, start: int, count: int, first_row: int, images: bool
    ) -> pa.Table:
        rows = self.listings[shard.file].rows(shard.first + start, count)
        named = [row[name] for row in rows for name in BLOBS]
        contents = iter(self.images.read_all(named) if images else [None] * len(named))
        for number, row in enumerate(rows, first_row):
            row["row"] = number
            for side, name in enumerate(BLOBS):
                if isinstance(row[name], bytes) and row[f"uid_{side}"] is None:
                    row[f"uid_{side}"] = image_key(row[name]).hex()
                row[name] = next(contents)
        table = pa.Table.from_pylist(rows, schema=PAIR)
        return table if images else table.drop_columns(list(BLOBS))

    def fingerprint(self, shard: PairShard) -> dict[str, str]:
        """What names the content of the shard's list: sha256, or an object store's etag."""
        return self.store.fingerprint(shard.file)

    def _estimate(self, shard: PairShard, start: int, rows: int) -> int:
        listing = self.listings[shard.file]
        measured = min(rows, NUM_MEASURED)
        values = [
            row[name] for row in listing.rows(shard.first + start, measured) for name in BLOBS
        ]
        sizes = [
            self.images.bytes_of(value) if isinstance(value, str) else len(value or b"")
            for value in values
        ]
        return sum(sizes) * rows // measured


def as_listed(rows: Iterable[tuple[str | None, str | None, str | None, float | None]]) -> InMemory:
    """A list of (prompt, path 0, path 1, human); the path is the image's uid."""
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    prompt, left, right, human = (list(column) for column in columns)
    nobody = [None] * len(prompt)
    arrays = [prompt, left, right, human, nobody, nobody, left, right]
    return InMemory(pa.table(dict(zip(LISTED.names, arrays, strict=True)), schema=LISTED))


def listed_pairs(
    root: Store,
    spec: PairsSpec,
    listings: Mapping[str, Listing],
    prefixes: tuple[str, ...] = ("",),
    reading: str = "",
    archives: tuple[str, ...] = ARCHIVES,
) -> ListedPairs:
    """A pair set from its lists, after a look whether the images are where they say.

    Raises:
        StoreError: There is no such folder of images.
        PairsError: The images are not where the lists say.
    """
    shards = cut(root, listings, spec, reading)
    hint = "give the folder of the images"
    images = open_store("pairs.image_root", spec.image_root, hint) if spec.image_root else root
    tried = _some_paths(shards, listings)
    return ListedPairs(root, shards, listings, open_images(images, prefixes, tried, archives))


def cut(
    root: Store, listings: Mapping[str, Listing], spec: PairsSpec, reading: str
) -> tuple[PairShard, ...]:
    """Shards of `SHARD_ROWS` pairs, until there are `max_pairs`."""
    shards: list[PairShard] = []
    total = 0
    for name, listing in listings.items():
        size = size_of(root, name)
        for number, first in enumerate(range(0, listing.num_rows, SHARD_ROWS)):
            if spec.max_pairs and total >= spec.max_pairs:
                return tuple(shards)
            rows = min(SHARD_ROWS, listing.num_rows - first)
            stretch = f"{name}#{number:05d}"
            shards.append(PairShard(len(shards), stretch, name, rows, size, first, reading))
            total += rows
    return tuple(shards)


def _some_paths(shards: tuple[PairShard, ...], listings: Mapping[str, Listing]) -> list[str | None]:
    """Paths of some pairs spread over the set."""
    step = max(1, len(shards) // NUM_TRIED)
    count = max(1, NUM_TRIED // max(1, len(shards)))
    rows = [
        row
        for shard in shards[::step]
        for at in range(0, shard.rows, max(1, shard.rows // count))
        for row in listings[shard.file].rows(shard.first + at, 1)
    ]
    return [row[name] for row in rows for name in BLOBS if isinstance(row[name], str)]
