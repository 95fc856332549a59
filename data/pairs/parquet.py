"""Any Parquet files with one pair a row, under a column map."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from data.pairs.column_map import column_map
from data.pairs.config import Images, PairsSpec
from data.pairs.files import find_files, open_root
from data.pairs.image_list import LISTED, InMemory, listed_pairs
from data.pairs.kinds import Kind, kinds_of
from data.pairs.parquet_file import read_columns
from data.pairs.parquet_pairs import checked_footers, parquet_pairs
from data.pairs.schema import BLOBS, PairSource
from data.storage.base import Store


def open_layout(spec: PairsSpec) -> PairSource:
    """Open Parquet files whose images are in them, or named by path."""
    root = open_root(spec)
    columns, reading = column_map(spec)
    kinds = kinds_of(spec.images)
    files = find_files(root, spec.split, ".parquet")
    footers = checked_footers(root, files, spec, columns, tuple(columns.values()))
    if spec.images is Images.inline:
        small = {columns[ours]: kinds[ours] for ours in ("human", "known") if ours in columns}
        for name in footers if small else ():
            read_columns(root, name, small)  # whose values are checked before any weight loads
        return parquet_pairs(root, footers, columns, reading)
    listings = {name: _paths_of(root, name, columns, kinds) for name in footers}
    return listed_pairs(root, spec, listings, reading=reading)


def _paths_of(
    root: Store, name: str, columns: Mapping[str, str], kinds: Mapping[str, Kind]
) -> InMemory:
    """A list of paths from a table; the uid is the path unless there is a column for it."""
    table = read_columns(root, name, {column: kinds[ours] for ours, column in columns.items()})
    named = {ours: table[column] for ours, column in columns.items()}
    for side, image in enumerate(BLOBS):
        named.setdefault(f"uid_{side}", named[image])
    if "known" in named and "human" in named:
        nobody = pa.scalar(None, pa.float32())
        named["human"] = pc.if_else(named["known"], named["human"], nobody)
    nothing = pa.nulls(table.num_rows)
    arrays = [named.get(field.name, nothing).cast(field.type) for field in LISTED]
    return InMemory(pa.table(arrays, schema=LISTED))
