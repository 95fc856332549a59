"""Parquet files with one pair a row: Pick-a-Pic, or any columns under a map."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.pairs.config import Images, PairsSpec
from data.pairs.files import check_names, find_files, size_of
from data.pairs.image_list import LISTED, InMemory, listed_pairs
from data.pairs.parquet_file import open_file, read_columns, read_footers, reading, valid_text
from data.pairs.schema import BLOBS, PAIR, PairsError, PairShard, PairSource, image_key
from data.storage.base import Store, ahead

NEEDED = ("prompt", "image_0", "image_1")
OPTIONAL = ("uid_0", "uid_1", "human", "known", "generator_0", "generator_1")
"""`human` is 1 for image 0, 0 for image 1, between for a tie; where `known` is false, nobody chose.
Without a uid an image is named by its path, or by its bytes."""

BYTES = ("binary", "large_binary")
TEXT = ("string", "large_string")

PICKAPIC = {
    "prompt": "caption",
    "uid_0": "image_0_uid",
    "uid_1": "image_1_uid",
    "image_0": "jpg_0",
    "image_1": "jpg_1",
    "human": "label_0",
    "known": "has_label",
    "generator_0": "model_0",
    "generator_1": "model_1",
}
"""Our word -> the column of Pick-a-Pic v1 and v2 (facts: `jpg_0` may hold a PNG)."""
PICKAPIC_NEEDED = ("caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1")
"""`has_label` is absent from some mirrors."""


AHEAD = 8
"""Batches of pairs that are fetched from an object store before they are wanted."""


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
        tables = self._read(shard, images, batch_rows)
        return ahead(tables, AHEAD) if self.store.far else tables

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
            found = file.read_row_group(group, columns=names, use_threads=False)
            return as_pairs(found, columns, 0)

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
    made: dict[str, Any] = {"row": pa.array(range(first_row, first_row + count), pa.int64())}
    for ours in PAIR.names[1:]:
        if ours in columns:
            made[ours] = _cast(batch[columns[ours]], PAIR.field(ours).type)
    if "known" in columns and "human" in made:
        nobody = pa.scalar(None, pa.float32())
        made["human"] = pc.if_else(batch[columns["known"]], made["human"], nobody)
    for side, image in enumerate(BLOBS):
        if f"uid_{side}" not in made and image in made:
            keys = [None if c is None else image_key(c).hex() for c in made[image].to_pylist()]
            made[f"uid_{side}"] = pa.array(keys, pa.string())
    for name in PAIR.names[:-2]:
        made.setdefault(name, pa.nulls(count, PAIR.field(name).type))
    names = [name for name in PAIR.names if name in made]
    return pa.table([made[name] for name in names], names=names)


def _cast(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_struct(column.type):  # Hugging Face's Image: {bytes, path}
        column = pc.struct_field(column, "bytes")
    return valid_text(column.cast(wanted))


def open_pickapic(root: Store, spec: PairsSpec) -> PairSource:
    """Parquet files in the schema of Pick-a-Pic v1 and v2."""
    files = find_files(root, spec.split, ".parquet")
    footers = _footers(root, files, spec.max_pairs, PICKAPIC_NEEDED)
    return ParquetPairs(root, _whole_files(root, footers, ""), PICKAPIC, footers)


def open_parquet(root: Store, spec: PairsSpec) -> PairSource:
    """Parquet files under a column map, with the images in them or named by path."""
    columns, reading = column_map(spec)
    files = find_files(root, spec.split, ".parquet")
    footers = _footers(root, files, spec.max_pairs, tuple(columns.values()))
    for name, footer in footers.items():
        _check_types(root, name, footer, columns, spec.images)
    if spec.images is Images.inline:
        return ParquetPairs(root, _whole_files(root, footers, reading), columns, footers)
    wanted = list(dict.fromkeys(columns.values()))
    listings = {name: _paths_of(read_columns(root, name, wanted), columns) for name in footers}
    return listed_pairs(root, spec, listings, reading=reading)


def column_map(spec: PairsSpec) -> tuple[dict[str, str], str]:
    """The map without its empty names, and the text of what decides the rows.

    Raises:
        PairsError: A word is not ours, or one that is needed has no column.
    """
    columns = {ours: name for ours, name in spec.columns.items() if name}
    allowed = (*NEEDED, *OPTIONAL)
    if unknown := [word for word in spec.columns if word not in allowed]:
        raise PairsError(
            f"pairs.columns has {unknown[0]}; allowed: {', '.join(allowed)} (our word -> column)"
        )
    if missing := [word for word in NEEDED if word not in columns]:
        raise PairsError(f"pairs.columns names no column for {', '.join(missing)}")
    return columns, json.dumps({"columns": columns, "images": spec.images.value}, sort_keys=True)


def _footers(
    root: Store, files: Sequence[str], max_pairs: int, needed: Sequence[str]
) -> dict[str, Any]:
    footers = read_footers(root, files, max_pairs)
    for name, footer in footers.items():
        check_names(f"{root.url}/{name}", needed, footer.schema.to_arrow_schema().names)
    return footers


def _whole_files(root: Store, footers: Mapping[str, Any], reading: str) -> tuple[PairShard, ...]:
    return tuple(
        PairShard(i, name, name, int(footer.num_rows), size_of(root, name), reading=reading)
        for i, (name, footer) in enumerate(footers.items())
    )


def _check_types(
    root: Store, file: str, footer: Any, columns: Mapping[str, str], images: Images
) -> None:
    """Refuse columns that do not hold what the map says.

    Raises:
        PairsError: Names the column, its type, and what is needed.
    """
    path, schema = f"{root.url}/{file}", footer.schema.to_arrow_schema()
    for ours in NEEDED:
        name = columns[ours]
        found = schema.field(name).type
        if ours in BLOBS and pa.types.is_struct(found):
            check_names(f"{path}, {name}", ["bytes"], [field.name for field in found])
            found = found.field("bytes").type
        inline = ours in BLOBS and images is Images.inline
        if str(found) not in (BYTES if inline else TEXT):
            raise PairsError(
                f"{path}: column {name} is {found}, but {ours} is to be "
                f"{'bytes' if inline else 'text'} with pairs.images={images.value}; name another "
                f"column (pairs.columns.{ours}=...), or set pairs.images=inline for bytes, paths "
                "for text"
            )
    if "human" in columns:
        values = read_columns(root, file, [columns["human"]])[columns["human"]].to_pylist()
        check_human(path, columns["human"], values)


def check_human(where: str, column: str, values: Sequence[Any]) -> None:
    """Refuse a column that codes choices otherwise.

    Raises:
        PairsError: Names a value outside [0, 1], and what the column is to hold.
    """
    for value in values:
        if value is not None and not in_unit(value) and value == value:  # NaN is no choice
            raise PairsError(
                f"{where}: column {column} has {value!r}; a human choice is 1 for image 0, 0 for "
                "image 1, 0.5 for a tie, null where nobody chose: rewrite the column, or leave "
                "pairs.columns.human empty"
            )


def in_unit(value: Any) -> bool:
    """Whether a value can be a human choice."""
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _paths_of(table: pa.Table, columns: Mapping[str, str]) -> InMemory:
    """A list of paths from a table; the uid is the path unless there is a column for it."""
    named = {ours: table[name] for ours, name in columns.items()}
    for side, image in enumerate(BLOBS):
        named.setdefault(f"uid_{side}", named[image])
    if "known" in named and "human" in named:
        named["human"] = pc.if_else(named["known"], named["human"], None)
    nothing = pa.nulls(table.num_rows)
    arrays = [named.get(field.name, nothing).cast(field.type) for field in LISTED]
    return InMemory(pa.table(arrays, schema=LISTED))
