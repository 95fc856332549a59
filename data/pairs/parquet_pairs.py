"""Pairs in Parquet files with one pair a row and the images in it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.pairs.config import Images, PairsSpec
from data.pairs.files import check_names, size_of
from data.pairs.kinds import Kind, cast_column, check_types, kinds_of
from data.pairs.parquet_file import open_file, read_footers, reading
from data.pairs.schema import BLOBS, PAIR, PairShard, image_key
from data.storage.base import Store
from data.storage.prefetch import prefetch

PREFETCH = 8
"""Batches of pairs fetched from an object store before they are wanted."""


@dataclass(frozen=True, slots=True)
class ParquetPairs:
    """Parquet files with the images in them."""

    store: Store
    shards: tuple[PairShard, ...]
    columns: Mapping[str, str]
    """Our word -> their column."""
    footers: Mapping[str, Any]
    """File -> its `pq.FileMetaData`, read once."""

    @property
    def root(self) -> str:
        """The set's folder, or its URL."""
        return self.store.url

    def read(
        self, shard: PairShard, *, images: bool = True, batch_rows: int = 64
    ) -> Iterator[pa.Table]:
        """The shard's pairs in file order, `batch_rows` at a time, in the columns of `PAIR`.

        Raises:
            PairsError: The file is damaged; names the first row that cannot be read.
        """
        depth = PREFETCH if self.store.remote else 0
        with prefetch(self._read(shard, images, batch_rows), depth) as tables:
            yield from tables

    def _read(self, shard: PairShard, images: bool, batch_rows: int) -> Iterator[pa.Table]:
        with open_file(self.store, shard.file, self.footers[shard.file]) as file:
            columns = self._present(file, images)
            names = list(dict.fromkeys(columns.values()))
            batches = file.iter_batches(batch_rows, columns=names, use_threads=False)
            row = 0
            while True:
                with reading(self.store, shard.file, f"row {row}, or one soon after it,"):
                    if (batch := next(batches, None)) is None:
                        return
                    table = self._as_pairs(shard, pa.table(batch), columns, row)
                yield table
                row += table.num_rows

    def row_groups(self, shard: PairShard) -> list[tuple[int, int]]:
        """Rows and uncompressed bytes of each row group, from the file's footer."""
        metadata = self.footers[shard.file]
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]

    def read_row_group(self, shard: PairShard, group: int) -> pa.Table:
        """One whole row group of the shard, in the columns of `PAIR`; rows count from 0 in it.

        Raises:
            PairsError: The file is damaged.
        """
        with (
            open_file(self.store, shard.file, self.footers[shard.file]) as file,
            reading(self.store, shard.file, f"row group {group}"),
        ):
            columns = self._present(file, images=True)
            names = list(dict.fromkeys(columns.values()))
            table = file.read_row_group(group, columns=names, use_threads=False)
            return self._as_pairs(shard, table, columns, 0)

    def fingerprint(self, shard: PairShard) -> dict[str, str]:
        """What names the content of the shard's file: sha256, or an object store's etag."""
        return self.store.fingerprint(shard.file)

    def _as_pairs(
        self, shard: PairShard, batch: pa.Table, columns: Mapping[str, str], first_row: int
    ) -> pa.Table:
        where = f"{self.store.url}/{shard.file}"
        return as_pairs(where, batch, columns, kinds_of(Images.inline), first_row)

    def _present(self, file: pq.ParquetFile, images: bool) -> dict[str, str]:
        """The part of the map to read of a file."""
        there = set(file.schema_arrow.names)
        return {
            ours: name
            for ours, name in self.columns.items()
            if name in there and (images or ours not in BLOBS)
        }


def as_pairs(
    where: str,
    batch: pa.Table,
    columns: Mapping[str, str],
    kinds: Mapping[str, Kind],
    first_row: int,
) -> pa.Table:
    """Rename their columns to `PAIR`'s, in its types; image columns only if the map has them.

    Raises:
        PairsError: A value is outside the range of its kind; begins with `where`.
    """
    count = batch.num_rows
    pairs: dict[str, Any] = {"row": pa.array(range(first_row, first_row + count), pa.int64())}
    for ours, name in columns.items():
        pairs[ours] = cast_column(where, name, batch[name], kinds[ours], first_row)
    known = pairs.pop("known", None)
    if known is not None and "human" in pairs:
        pairs["human"] = pc.if_else(known, pairs["human"], pa.scalar(None, pa.float32()))
    for side, image in enumerate(BLOBS):
        if f"uid_{side}" not in pairs and image in pairs:
            keys = [None if c is None else image_key(c).hex() for c in pairs[image].to_pylist()]
            pairs[f"uid_{side}"] = pa.array(keys, pa.string())
    for name in PAIR.names[:-2]:
        pairs.setdefault(name, pa.nulls(count, PAIR.field(name).type))
    names = [name for name in PAIR.names if name in pairs]
    return pa.table([pairs[name] for name in names], names=names)


def parquet_pairs(
    root: Store, footers: Mapping[str, Any], columns: Mapping[str, str], reading: str = ""
) -> ParquetPairs:
    """A pair set of whole files, under a map from our words to their columns."""
    shards = tuple(
        PairShard(i, name, name, int(footer.num_rows), size_of(root, name), reading=reading)
        for i, (name, footer) in enumerate(footers.items())
    )
    return ParquetPairs(root, shards, columns, footers)


def checked_footers(
    root: Store,
    files: Sequence[str],
    spec: PairsSpec,
    columns: Mapping[str, str],
    needed: Sequence[str],
) -> dict[str, Any]:
    """The footers of the first files that together have `spec.max_pairs` rows; 0 means of all.

    Raises:
        PairsError: A file is torn, lacks a column that is needed, or has one of another type.
    """
    mapped = bool(spec.columns)
    kinds = kinds_of(spec.images if mapped else Images.inline)
    footers = read_footers(root, files, spec.max_pairs)
    for name, footer in footers.items():
        where, schema = f"{root.url}/{name}", footer.schema.to_arrow_schema()
        check_names(where, needed, schema.names)
        check_types(where, schema, columns, kinds, mapped=mapped)
    return footers
