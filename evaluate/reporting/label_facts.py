"""What the run's label set says of itself, for the report; the two stages meet on disk alone."""

from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl

from data.artifacts.manifest import read_manifest


def label_facts(folder: Path) -> dict[str, Any] | None:
    """Counts and agreement of a complete label set; None where there is none."""
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
    return {
        "folder": str(folder),
        "pairs": len(frame),
        "decided": len(frame) - frame["winner"].null_count(),
        "outcomes": manifest.counts,
        "voters": [name.removeprefix("vote_") for name in votes],
        "agreement": agreement(frame, votes),
        "identity": manifest.identity,
        "code_revision": manifest.code_revision,
    }


def agreement(frame: pl.DataFrame, votes: list[str]) -> list[list[float | None]]:
    """Share of equal votes of each two voters, where neither abstains; None without such pairs."""
    found: list[list[float | None]] = [
        [1.0 if row == column else None for column in votes] for row in votes
    ]
    for (i, left), (j, right) in combinations(enumerate(votes), 2):
        both = frame.filter((pl.col(left) * pl.col(right)).fill_null(0) != 0)
        if len(both):
            share = (both[left] == both[right]).sum() / len(both)
            found[i][j] = found[j][i] = float(share)
    return found
