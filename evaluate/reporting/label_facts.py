"""The run's label set, summarised for the report; the two stages meet on disk alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data.artifacts.manifest import read_manifest, verify
from data.artifacts.parquet_io import read_table
from data.artifacts.votes import equal_votes


def label_facts(folder: Path) -> dict[str, Any] | None:
    """Counts of a complete label set, and how often its voters agree; None if there is no set.

    Raises:
        ShardError: The set is damaged.
    """
    import polars as pl

    manifest = read_manifest(folder, "labels")
    if manifest is None:
        return None
    verify(folder, manifest)
    files = [folder / file.name for file in manifest.files]
    votes = [name for name in pq.read_schema(files[0]).names if name.startswith("vote_")]
    labels = pl.concat(
        pl.DataFrame(read_table(file, [*votes, "winner", "human"])) for file in files
    )
    frame = labels.select(*votes, "winner", vote_human=(pl.col("human") - 0.5).sign().cast(pl.Int8))
    if frame["vote_human"].abs().sum():
        votes = [*votes, "vote_human"]
    matrix = equal_votes(frame.select(pl.col(votes).fill_null(0)).to_numpy(), np.ones(len(frame)))
    return {
        "folder": str(folder),
        "pairs": len(frame),
        "decided": len(frame) - frame["winner"].null_count(),
        "outcomes": manifest.counts,
        "voters": [name.removeprefix("vote_") for name in votes],
        "agreement": [[None if np.isnan(v) else v for v in row] for row in matrix.tolist()],
        "identity": manifest.identity,
        "code_revision": manifest.code_revision,
    }
