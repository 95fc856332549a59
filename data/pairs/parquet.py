"""Any Parquet files with one pair a row, under a column map."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data.pairs.column_map import NEEDED, check_human, column_map
from data.pairs.config import Images, PairsSpec
from data.pairs.files import check_names, find_files, open_root
from data.pairs.image_list import LISTED, InMemory, listed_pairs
from data.pairs.parquet_file import read_columns
from data.pairs.parquet_pairs import checked_footers, parquet_pairs
from data.pairs.schema import BLOBS, PairsError, PairSource
from data.storage.base import Store

BYTES = ("binary", "large_binary")
TEXT = ("string", "large_string")


def open_layout(spec: PairsSpec) -> PairSource:
    """Open Parquet files whose images are in them, or named by path."""
    root = open_root(spec)
    columns, reading = column_map(spec)
    files = find_files(root, spec.split, ".parquet")
    footers = checked_footers(root, files, spec.max_pairs, tuple(columns.values()))
    for name, footer in footers.items():
        _check_types(root, name, footer, columns, spec.images)
    if spec.images is Images.inline:
        return parquet_pairs(root, footers, columns, reading)
    wanted = list(dict.fromkeys(columns.values()))
    listings = {name: _paths_of(read_columns(root, name, wanted), columns) for name in footers}
    return listed_pairs(root, spec, listings, reading=reading)


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
        kind = schema.field(name).type
        if ours in BLOBS and pa.types.is_struct(kind):
            check_names(f"{path}, {name}", ["bytes"], [field.name for field in kind])
            kind = kind.field("bytes").type
        inline = ours in BLOBS and images is Images.inline
        if str(kind) not in (BYTES if inline else TEXT):
            raise PairsError(
                f"{path}: column {name} is {kind}, but {ours} must be "
                f"{'bytes' if inline else 'text'} with pairs.images={images.value}; name another "
                f"column (pairs.columns.{ours}=...), or set pairs.images=inline for bytes, paths "
                "for text"
            )
    if "human" in columns:
        values = read_columns(root, file, [columns["human"]])[columns["human"]].to_pylist()
        check_human(path, columns["human"], values)


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
