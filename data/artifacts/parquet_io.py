"""Parquet files with page checksums and, in their footers, the settings that made them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.artifacts.atomic import ShardError, atomic_path

SETTINGS_KEY = b"balanceddpo.settings"


ROW_GROUP_ROWS = 65_536

AGAIN = "delete it and run the same command again"
"""What to do about a file that cannot be used."""


def write_table(
    path: Path,
    table: pa.Table,
    settings: Mapping[str, Any] | None = None,
    *,
    blobs: Sequence[str] = (),
    row_group_rows: int = ROW_GROUP_ROWS,
    keep_existing: bool = False,
) -> None:
    """Write a Parquet file whole or not at all, with page checksums and its settings in the footer.

    `blobs` names columns of encoded bytes: they are stored as they are, without dictionary,
    statistics or compression, which is 5 to 10 times faster to stream. With `keep_existing` a file
    that another process has written meanwhile stays.
    """
    plain = [name for name in table.column_names if name not in blobs]
    if settings is not None:
        footer = {SETTINGS_KEY: json.dumps(settings, sort_keys=True).encode()}
        table = table.replace_schema_metadata(footer)
    with atomic_path(path, keep_existing=keep_existing) as partial:
        pq.write_table(
            table,
            partial,
            row_group_size=row_group_rows,
            compression={name: "none" if name in blobs else "zstd" for name in table.column_names},
            use_dictionary=plain if blobs else True,
            write_statistics=plain if blobs else True,
            write_page_checksum=True,
        )


@contextmanager
def table_writer(
    path: Path,
    schema: pa.Schema,
    settings: Mapping[str, Any],
    blobs: Sequence[str],
    compression: str = "none",
) -> Iterator[pq.ParquetWriter]:
    """A Parquet file as `write_table` writes it, to be written a row group at a time.

    It appears at the end of the block, unless another process has written it meanwhile.
    `compression` is that of the blobs.
    """
    plain = [name for name in schema.names if name not in blobs]
    footer = {SETTINGS_KEY: json.dumps(settings, sort_keys=True).encode()}
    with (
        atomic_path(path, keep_existing=True) as partial,
        pq.ParquetWriter(
            partial,
            schema.with_metadata(footer),
            compression={name: compression if name in blobs else "zstd" for name in schema.names},
            use_dictionary=plain,
            write_statistics=plain,
            write_page_checksum=True,
        ) as writer,
    ):
        yield writer


def read_table(path: Path, columns: Sequence[str] | pa.Schema | None = None) -> pa.Table:
    """Read a shard, all of it or some columns; a damaged page is an error, not data.

    Raises:
        ShardError: The file is missing, torn or damaged, or has not these columns (of a schema:
            with these types).
    """
    names = columns.names if isinstance(columns, pa.Schema) else columns
    try:  # not pq.read_table: its planning takes twice the time of reading 1 500 rows
        file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
        table = file.read(columns=names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path} cannot be read ({error}); {AGAIN}") from error
    if lacking := [name for name in names or () if table.column_names.count(name) != 1]:
        raise ShardError(
            f"{path} needs one column each of {', '.join(lacking)}, and has "
            f"{', '.join(file.schema_arrow.names) or 'none'}; {AGAIN}"
        )
    for field in columns if isinstance(columns, pa.Schema) else ():
        if (kind := table.schema.field(field.name).type) != field.type:
            raise ShardError(f"{path} has {field.name} as {kind}, needed {field.type}; {AGAIN}")
    return table


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a shard's footer; empty when it has none.

    Raises:
        ShardError: The file is torn or is no Parquet file.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        settings = json.loads(metadata.get(SETTINGS_KEY, b"{}"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ShardError(f"{path} cannot be read ({error}); {AGAIN}") from error
    if not isinstance(settings, dict):
        raise ShardError(f"{path} has a footer that is not ours; {AGAIN}")
    return settings
