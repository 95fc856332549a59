"""The decided pairs of a label set, and where their images are in the pair files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.artifacts.atomic import ShardError
from data.artifacts.manifest import read_manifest, verify
from data.artifacts.parquet_io import read_table
from data.pairs.schema import PairSource
from train.loader.image_source import RowGroup

COLUMNS = [
    "pair_id", "prompt", "source", "row", "image_0", "image_1", "winner", "margin",
    "votes_0", "votes_1",
    "width_0", "height_0", "width_1", "height_1",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecidedPairs:
    """The pairs of a label set that have a winner, and where their images are."""

    table: pa.Table
    """The columns `COLUMNS`, in the order of the label set."""
    identity: str
    """Identity of the label set; see `Manifest.identity`."""
    group: np.ndarray
    """Each pair's row group, as index into `groups`."""
    row: np.ndarray
    """Each pair's row in its row group."""
    groups: tuple[RowGroup, ...]
    held_out: "DecidedPairs | None" = None
    """Pairs kept for validation, and not trained on."""

    def __len__(self) -> int:
        return len(self.row)

    def only(self, indices: np.ndarray) -> "DecidedPairs":
        """Select pairs, in the given order."""
        return replace(
            self,
            table=self.table.take(indices),
            group=self.group[indices],
            row=self.row[indices],
        )


def decided_pairs(labels: Path, source: PairSource) -> DecidedPairs:
    """Read the label set and locate its decided pairs in the pair files.

    Raises:
        ShardError: There is no complete label set, it is damaged, or it is of other pair files.
    """
    manifest = read_manifest(labels, "labels")
    if manifest is None:
        raise ShardError(f"{labels} holds no complete label set; run `make labels` first")
    verify(labels, manifest)
    table = pa.concat_tables([read_table(labels / f.name, COLUMNS) for f in manifest.files])
    table = table.filter(pc.is_valid(table["winner"])).combine_chunks()
    names = table["source"].to_pylist()
    if missing := sorted(set(names) - {shard.name for shard in source.shards}):
        raise ShardError(
            f"{labels} was made from {missing[0]}, which is not under {source.root}; "
            "give the pairs that were labelled (pairs.root=...)"
        )
    group, row, groups = _locate(names, table["row"].to_numpy(), source)
    return DecidedPairs(table, manifest.identity, group, row, groups)


def _locate(
    names: Sequence[str], rows: np.ndarray, source: PairSource
) -> tuple[np.ndarray, np.ndarray, tuple[RowGroup, ...]]:
    """Return each pair's row group, its row in the group, and all row groups."""
    shards = {shard.name: shard for shard in source.shards}
    groups: list[RowGroup] = []
    group, row = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    named = np.array(names, dtype=object)
    for name in sorted(set(names)):
        row_groups = source.row_groups(shards[name])
        ends = np.cumsum([rows_in_group for rows_in_group, _ in row_groups], dtype=np.int64)
        ours = np.flatnonzero(named == name)
        if rows[ours].max() >= (num_rows := int(ends[-1]) if row_groups else 0):
            raise ShardError(
                f"{source.root}/{name} has {num_rows} rows, but a labelled pair is its row "
                f"{rows[ours].max()}; give the pairs that were labelled (pairs.root=...)"
            )
        inside = np.searchsorted(ends, rows[ours], side="right")
        group[ours] = inside + len(groups)
        row[ours] = rows[ours] - np.concatenate([[0], ends])[inside]
        groups += [RowGroup(shards[name], i, size) for i, (_, size) in enumerate(row_groups)]
    return group, row, tuple(groups)
