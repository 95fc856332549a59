"""The run's label set, summarised for the report; the two stages meet on disk alone."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data.artifacts.manifest import read_manifest
from data.artifacts.votes import equal_votes


def label_facts(folder: Path) -> dict[str, Any] | None:
    """Counts of a complete label set, and how often its voters agree; None if there is no set."""
    manifest = read_manifest(folder, "labels")
    if manifest is None:
        return None
    files = [folder / file.name for file in manifest.files]
    lazy = pl.scan_parquet(files)
    votes = [name for name in lazy.collect_schema().names() if name.startswith("vote_")]
    frame = lazy.select(
        *votes, "winner", vote_human=(pl.col("human") - 0.5).sign().cast(pl.Int8)
    ).collect()
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
