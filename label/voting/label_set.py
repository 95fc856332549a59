"""The label set on disk: reads score shards, writes label shards and their manifest."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from data.artifacts.atomic import ShardError, remove_partials
from data.artifacts.config_diff import differences
from data.artifacts.manifest import (
    FileEntry,
    Manifest,
    describe,
    part_name,
    read_manifest,
    verify,
    write_manifest,
)
from data.artifacts.parquet_io import read_settings, read_table, write_table
from data.artifacts.schemas import PAIR_FACTS, SCORES, Status, labels
from data.pairs.schema import PairShard
from label.scoring.score_sets import FACTS, ScoreSets
from label.voting.rules import VotingRule, label_pairs

KIND = "labels"
THREADS = 8
"""Files read or written at a time."""


@dataclass(frozen=True, slots=True)
class LabelSet:
    """A folder of label shards and what decides its rows."""

    folder: Path
    settings: Mapping[str, Any]

    def read_if_complete(self) -> pl.DataFrame | None:
        """The labels, or None when they are not complete.

        Raises:
            ShardError: The folder has labels of another vote, or a damaged file.
        """
        manifest = read_manifest(self.folder, KIND)
        if manifest is None:
            for path in sorted(self.folder.glob("part-*.parquet")):
                self._refuse_others(read_settings(path))
            return None
        self._refuse_others(manifest.settings)
        verify(self.folder, manifest)
        return read_labels(self.folder, manifest)

    def _refuse_others(self, settings: Mapping[str, Any]) -> None:
        if differing := differences(settings, self.settings):
            raise ShardError(
                f"{self.folder} holds labels made with other settings ({'; '.join(differing)}); "
                "give this vote another name (vote.name=...), set them back, or delete the folder"
            )

    def facts(self) -> dict[str, Any]:
        """What made the set, from its manifest, for people to read."""
        manifest = read_manifest(self.folder, KIND)
        assert manifest is not None
        return {
            "code revision": manifest.code_revision,
            **manifest.settings,
            "versions": manifest.provenance.get("versions", {}),
        }

    def write(
        self, labelled: pl.DataFrame, sets: ScoreSets, metrics: tuple[str, ...]
    ) -> list[FileEntry]:
        """Write one file per pair shard, rows in the pairs' order."""
        starts = accumulate([0, *(shard.rows for shard in sets.shards)])

        def write_part(shard: PairShard, start: int) -> FileEntry:
            part = labelled.slice(start, shard.rows).to_arrow().cast(labels(metrics))
            path = self.folder / part_name(shard.index)
            write_table(path, part, self.settings)
            return describe(path)

        with ThreadPoolExecutor(THREADS) as threads:  # most of the time is waiting for the disk
            return list(threads.map(write_part, sets.shards, starts))


def label_settings(
    voting_rule: VotingRule,
    vote: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    shards: tuple[PairShard, ...],
) -> dict[str, Any]:
    """What decides a label set: the vote, the metrics' settings, and which pairs."""
    named = {name: value for name, value in vote.items() if name != "name"}
    if not named.get("weights"):  # equal to sets from before there were weights
        named.pop("weights", None)
    listing = "\n".join(
        f"{shard.name}\0{shard.bytes}" + (f"\0{shard.reading}" if shard.reading else "")
        for shard in shards
    )
    settings = {
        "kind": KIND,
        "vote": named,
        "voters": list(voting_rule.voters),
        "metrics": {
            m: {**metrics[m], "tie": voting_rule.ties.get(m, 0.0)} for m in voting_rule.metrics
        },
        "pairs": {
            "files": len(shards),
            "rows": sum(shard.rows for shard in shards),
            "listing": sha256(listing.encode()).hexdigest(),
        },
    }
    return settings | ({"seed": voting_rule.seed} if vote["rule"] == "random" else {})


def make_labels(
    label_set: LabelSet,
    sets: ScoreSets,
    voting_rule: VotingRule,
    provenance: Mapping[str, Any],
    since: float,
) -> pl.DataFrame:
    """Vote over all pairs and write the labels; needs no model and no image.

    Raises:
        ShardError: A score shard is damaged, or does not belong to the others.
        ValueError: Not a single pair could be decided.
    """
    labelled = label_pairs(read_scored(sets, voting_rule.metrics), voting_rule)
    check_decided(labelled)
    files = label_set.write(labelled, sets, voting_rule.metrics)
    remove_partials(label_set.folder, since)
    manifest = Manifest(
        kind=KIND,
        settings=dict(label_set.settings),
        files=files,
        sources=sets.sources(),
        counts=outcomes(labelled),
        provenance=dict(provenance),
    )
    write_manifest(label_set.folder, manifest)
    return labelled


def check_decided(labelled: pl.DataFrame) -> None:
    """Refuse labels without a single winner.

    Raises:
        ValueError: No pair has a winner; says what became of them.
    """
    if labelled["winner"].null_count() == len(labelled):
        counts = ", ".join(f"{count} {word}" for word, count in outcomes(labelled).items())
        raise ValueError(
            f"none of the {len(labelled)} pairs can be decided ({counts}); choose another vote "
            "rule or tie rule, other voters, or look at the pairs"
        )


def outcomes(labelled: pl.DataFrame) -> dict[str, int]:
    """How many pairs each rule decided, or why not; the counts add up to the input."""
    counted = labelled["decided_by"].value_counts(sort=True)
    return {str(word): int(count) for word, count in counted.sort("count", "decided_by",
            descending=[True, False]).iter_rows()}  # fmt: skip


def statuses(labelled: pl.DataFrame) -> dict[str, int]:
    """How many pairs have each status, `ok` first."""
    counted = dict(labelled["status"].value_counts().iter_rows())
    return {status.value: counted[status.value] for status in Status if status.value in counted}


def read_labels(folder: Path, manifest: Manifest) -> pl.DataFrame:
    """All labels of a complete set."""
    with ThreadPoolExecutor(THREADS) as threads:
        tables = list(threads.map(read_table, [folder / file.name for file in manifest.files]))
    return _frame(pa.concat_tables(tables))


def read_scored(sets: ScoreSets, metrics: tuple[str, ...]) -> pl.DataFrame:
    """The pairs' facts beside every metric's scores, over all shards."""
    with ThreadPoolExecutor(THREADS) as threads:
        tables = list(threads.map(lambda shard: _beside(sets, shard, metrics), sets.shards))
    return _frame(pa.concat_tables(tables))


def _beside(sets: ScoreSets, shard: PairShard, metrics: tuple[str, ...]) -> pa.Table:
    facts = read_table(sets.path(FACTS, shard), PAIR_FACTS)
    columns = dict(zip(facts.column_names, facts.columns, strict=True))
    for metric in metrics:
        path = sets.path(metric, shard)
        scores = read_table(path, SCORES)
        if not scores["pair_id"].equals(facts["pair_id"]):
            raise ShardError(
                f"{path} is not about the same pairs as {sets.path(FACTS, shard)}; delete both "
                "and run the same command again"
            )
        for column in ("score", "status"):
            for side in (0, 1):
                columns[f"{column}_{metric}_{side}"] = scores[f"{column}_{side}"]
    return pa.table(columns)


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table.replace_schema_metadata(None))
    assert isinstance(frame, pl.DataFrame)
    return frame
