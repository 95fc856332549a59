"""Parquet files of a pair set, read row group by row group; a damaged one is named."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.pairs.kinds import Kind, cast_column
from data.pairs.schema import PairsError
from data.storage.base import THREADS, Store


@contextmanager
def open_file(store: Store, name: str, footer: Any = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file; pages are checked where the file has checksums.

    Memory stays near one row group: `pre_buffer` would hold a whole file.
    """
    with reading(store, name):
        file = pq.ParquetFile(
            store.arrow_source(name),
            metadata=footer,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    with file:
        yield file


@contextmanager
def reading(store: Store, name: str, part: str = "") -> Iterator[None]:
    """Say which file it is that Arrow, the disk or the store complains about.

    Raises:
        PairsError: Instead of their errors.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        with suppress(OSError):
            store.refuse_pointer(name)
        what = f"{part} cannot be read" if part else "is not a readable Parquet file"
        raise PairsError(
            f"{store.url}/{name} {what}: {error}; fetch it again if it is damaged, "
            "then rerun the same command: what is finished is kept"
        ) from error


def read_footers(store: Store, names: Sequence[str], max_rows: int = 0) -> dict[str, Any]:
    """The footers of the first files that together have `max_rows` rows; 0 means of all.

    Raises:
        PairsError: One is torn or no Parquet file.
    """

    def footer(name: str) -> Any:
        with open_file(store, name) as file:
            return file.metadata

    footers: dict[str, Any] = {}
    together = THREADS if store.remote else 1
    rows = 0
    with ThreadPoolExecutor(together) as threads:
        for start in range(0, len(names), together):
            some = names[start : start + together]
            for name, metadata in zip(some, threads.map(footer, some), strict=True):
                if max_rows and rows >= max_rows:
                    return footers
                footers[name] = metadata
                rows += metadata.num_rows
    return footers


def read_columns(store: Store, name: str, kinds: Mapping[str, Kind]) -> pa.Table:
    """Some small columns of a whole file, by their names, in the types of their kinds.

    Raises:
        PairsError: The file is damaged, or a value is outside the range of its kind.
    """
    with open_file(store, name) as file, reading(store, name):
        table = file.read(columns=list(kinds), use_threads=False)
        where = f"{store.url}/{name}"
        columns = [cast_column(where, key, table[key], kind) for key, kind in kinds.items()]
    return pa.table(columns, names=list(kinds))
