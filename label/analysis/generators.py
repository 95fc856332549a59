"""Reads which model generated which image, where the pair files say so."""

import polars as pl
import pyarrow as pa

from data.pairs.schema import PairSource

COLUMNS = ["generator_0", "generator_1"]
READ_ROWS = 65_536


def generators(pairs: PairSource) -> pl.DataFrame | None:
    """`generator_0` and `generator_1` of every pair, in the set's order; None if there are none.

    Label shards do not have these columns, so they are read from the pair files, without images. If
    the first file names no generator, the others are not read.
    """
    tables: list[pa.Table] = []
    for shard in pairs.shards:
        for table in pairs.read(shard, images=False, batch_rows=READ_ROWS):
            tables.append(table.select(COLUMNS))
            if all(column.null_count == len(column) for column in tables[0].columns):
                return None
    frame = pl.from_arrow(pa.concat_tables(tables))
    assert isinstance(frame, pl.DataFrame)
    return frame
