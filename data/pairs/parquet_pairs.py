"""Pairs in Parquet files with one pair a row and the images in it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.pairs.files import check_names, size_of
from data.pairs.parquet_file import open_file, read_footers, reading, valid_text
from data.pairs.schema import BLOBS, PAIR, PairShard, image_key
from data.prefetch import prefetch
from data.storage.base import Store

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
                    table = as_pairs(pa.table(batch), columns, row)
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
            return as_pairs(table, columns, 0)

    def fingerprint(self, shard: PairShard) -> dict[str, str]:
        """What names the content of the shard's file: sha256, or an object store's etag."""
        return self.store.fingerprint(shard.file)

    def _present(self, file: pq.ParquetFile, images: bool) -> dict[str, str]:
        """The part of the map to read of a file."""
        there = set(file.schema_arrow.names)
        return {
            ours: name
            for ours, name in self.columns.items()
            if name in there and (images or ours not in BLOBS)
        }


def as_pairs(batch: pa.Table, columns: Mapping[str, str], first_row: int) -> pa.Table:
    """Rename their columns to `PAIR`'s, in its types; image columns only if the map has them."""
    count = batch.num_rows
    pairs: dict[str, Any] = {"row": pa.array(range(first_row, first_row + count), pa.int64())}
    for ours in PAIR.names[1:]:
        if ours in columns:
            pairs[ours] = _cast(batch[columns[ours]], PAIR.field(ours).type)
    if "known" in columns and "human" in pairs:
        nobody = pa.scalar(None, pa.float32())
        pairs["human"] = pc.if_else(batch[columns["known"]], pairs["human"], nobody)
    for side, image in enumerate(BLOBS):
        if f"uid_{side}" not in pairs and image in pairs:
            keys = [None if c is None else image_key(c).hex() for c in pairs[image].to_pylist()]
            pairs[f"uid_{side}"] = pa.array(keys, pa.string())
    for name in PAIR.names[:-2]:
        pairs.setdefault(name, pa.nulls(count, PAIR.field(name).type))
    names = [name for name in PAIR.names if name in pairs]
    return pa.table([pairs[name] for name in names], names=names)


def _cast(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_struct(column.type):  # Hugging Face's Image: {bytes, path}
        column = pc.struct_field(column, "bytes")
    return valid_text(column.cast(wanted))


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
    root: Store, files: Sequence[str], max_pairs: int, needed: Sequence[str]
) -> dict[str, Any]:
    """The footers of the first files that together have `max_pairs` rows; 0 means of all.

    Raises:
        PairsError: A file is torn, or lacks a column that is needed.
    """
    footers = read_footers(root, files, max_pairs)
    for name, footer in footers.items():
        check_names(f"{root.url}/{name}", needed, footer.schema.to_arrow_schema().names)
    return footers
