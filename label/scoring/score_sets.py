"""What a run needs, what is there, and who does the rest; imports no torch.

Ranks share the pair shards without talking to each other. Each begins with a block of neighbouring
shards, which have images in common, and then takes what others have not begun (`claims`).
A score file that is there is finished; its footer says with which settings it was made.
"""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.artifacts.atomic import ShardError
from data.artifacts.config_diff import refuse_other_settings
from data.artifacts.latents import KIND as LATENTS
from data.artifacts.latents import LatentFormat
from data.artifacts.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    describe,
    part_name,
    read_manifest,
    write_manifest,
)
from data.artifacts.parquet_io import read_settings
from data.distributed import Rank
from data.pairs.schema import PairShard
from label.scoring.claims import Claims

FACTS = "pairs"
"""The set of `tables.PAIR_FACTS`, beside the metrics' sets."""


CLAIMS = "claims"
"""Folder of the claims, beside the sets."""


POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class ScoreSets:
    """The score sets of a run: one folder per metric, one file per pair shard."""

    folder: Path
    shards: tuple[PairShard, ...]
    metrics: Mapping[str, Mapping[str, Any]]
    """Metric -> the settings that decide its scores."""
    latents: LatentFormat | None = None
    """The images' latents, a set that lies beside `scores/`; None where they are not asked."""

    def __post_init__(self) -> None:
        for taken in {FACTS, CLAIMS, LATENTS} & self.metrics.keys():
            raise ValueError(
                f"a metric cannot be named {taken!r}; the folder of that name is taken"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All sets: the pairs' facts, then the metrics, then the latents."""
        return (FACTS, *self.metrics, *([LATENTS] if self.latents else []))

    def folder_of(self, name: str) -> Path:
        """Where a set lies."""
        if name == LATENTS and self.latents:
            return self.folder.parent / LATENTS / self.latents.name
        return self.folder / name

    def path(self, name: str, shard: PairShard) -> Path:
        """Where a set's file for a pair shard lies."""
        return self.folder_of(name) / part_name(shard.index)

    def own_settings(self, name: str) -> dict[str, Any]:
        """What decides a set apart from the pairs."""
        if name == LATENTS and self.latents:
            return self.latents.settings
        return {"kind": FACTS} if name == FACTS else dict(self.metrics[name])

    def settings(self, name: str, shard: PairShard) -> dict[str, Any]:
        """What a set's file for a pair shard must have been made with."""
        own = self.own_settings(name)
        source = {"name": shard.name, "bytes": shard.bytes}
        return own | {"source": source | ({"reading": shard.reading} if shard.reading else {})}

    def missing(self, shard: PairShard) -> tuple[str, ...]:
        """The sets that lack their file for this shard.

        Raises:
            ShardError: A file is torn, or was made with other settings.
        """
        return tuple(name for name in self.names if not self._is_there(name, shard))

    def _is_there(self, name: str, shard: PairShard) -> bool:
        path = self.path(name, shard)
        if not path.exists():
            return False
        found = read_settings(path)
        for word in ("sha256", "etag"):  # known only after the pairs were read
            found.get("source", {}).pop(word, None)
        refuse_other_settings(path, found, self.settings(name, shard))
        return True

    def absent(self, shard: PairShard) -> list[str]:
        """The sets whose file for this shard is still to be written; looks into no file."""
        return [name for name in self.names if not self.path(name, shard).exists()]

    def unfinished(self) -> list[PairShard]:
        """The shards that lack a file, whoever is at it."""
        return [shard for shard in self.shards if self.absent(shard)]

    def has_latents(self) -> bool:
        """Whether the latents are complete, or not asked.

        Raises:
            ShardError: There is a complete set of another format.
        """
        if self.latents is None:
            return True
        found = read_manifest(folder := self.folder_of(LATENTS), LATENTS)
        if found is not None:
            refuse_other_settings(folder, found.settings, self.own_settings(LATENTS))
        return found is not None and len(found.files) == len(self.shards)

    def sources(self) -> list[dict[str, Any]]:
        """The pair files with name, bytes and SHA-256, as the scoring pass recorded them."""
        footers = [read_settings(self.path(FACTS, shard)) for shard in self.shards]
        return [dict(footer["source"]) for footer in footers]

    def declare_complete(self, provenance: Mapping[str, Any], since: float) -> None:
        """Write the manifest of every set that has none or one of other files, and clean up.

        `since` is when this run began, in seconds since the epoch.

        Raises:
            ShardError: A file, perhaps another rank's, is torn, was made with other settings, or
                was changed after it was declared complete.
        """
        for shard in self.shards:
            assert not self.missing(shard)
        remove_partials(self.folder, since)
        sources = self.sources()
        for name in self.names:
            folder = self.folder_of(name)
            remove_partials(folder, since)
            files = [describe(self.path(name, shard)) for shard in self.shards]
            _check_rows(folder, [file.rows for file in files], self.shards)
            found = read_manifest(folder, name)
            if found is not None:
                _refuse_changed(folder, found.files, files, since)
                if found.files == files:
                    continue
            manifest = Manifest(
                kind=name,
                settings=self.own_settings(name),
                files=files,
                sources=sources,
                counts={"pairs": sum(shard.rows for shard in self.shards)},
                provenance=dict(provenance),
            )
            write_manifest(folder, manifest)


def remove_partials(folder: Path, since: float) -> None:
    """Remove what killed processes left half written (`shards.partial_of`).

    Files younger than `since`, when this run began, may be another rank's at work.
    """
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+-\d+", path.name) and path.stat().st_mtime < since:
            path.unlink(missing_ok=True)


def _check_rows(folder: Path, rows: list[int], shards: tuple[PairShard, ...]) -> None:
    for found, shard in zip(rows, shards, strict=True):
        if found != shard.rows:
            raise ShardError(
                f"{folder / part_name(shard.index)} has {found} rows, {shard.name} has "
                f"{shard.rows}; delete it and run the same command again"
            )


def _refuse_changed(
    folder: Path, known: list[FileEntry], files: list[FileEntry], since: float
) -> None:
    """A file that the manifest knows and that no process wrote since must be the same to the byte.

    A lost file may be made again, with rounding that differs from machine to machine.
    """
    before = {file.name: file for file in known}
    for file in files:
        path = folder / file.name
        if before.get(file.name, file) != file and path.stat().st_mtime < since:
            raise ShardError(
                f"{path} has other bytes than {MANIFEST} says (sha256 "
                f"{before[file.name].sha256[:12]}..., found {file.sha256[:12]}...): it was changed "
                "after it was finished. Delete it and run the same command again to make it anew; "
                f"or, to keep it as it is, delete {MANIFEST} beside it"
            )


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A pair shard and the sets to write for it."""

    shard: PairShard
    sets: tuple[str, ...]


def plan(sets: ScoreSets, rank: Rank) -> list[ShardTask]:
    """The unfinished shards of this rank's own block.

    Raises:
        ShardError: A finished file is torn, or was made with other settings.
    """
    mine = _blocks(sets, rank)[0]
    return [ShardTask(shard, todo) for shard in mine if (todo := sets.missing(shard))]


def claim_work(
    sets: ScoreSets, rank: Rank, claims: Claims, *, even_if_alive: bool = False
) -> Iterator[ShardTask]:
    """Claim unfinished shards one by one, until none is left that nobody is at.

    Own ones first; then those of others, which work on theirs from the other end.

    Raises:
        ShardError: A finished file is torn, or was made with other settings.
    """
    own, *others = _blocks(sets, rank)
    for shard in (*own, *(shard for block in others for shard in reversed(block))):
        if sets.absent(shard) and claims.take(shard.index, even_if_alive=even_if_alive):
            if todo := sets.missing(shard):  # its last owner may just have finished
                yield ShardTask(shard, todo)
            else:
                claims.release(shard.index)


def _blocks(sets: ScoreSets, rank: Rank) -> list[tuple[PairShard, ...]]:
    """All shards in a block for each rank, this rank's first."""
    edges = [len(sets.shards) * number // rank.world_size for number in range(rank.world_size + 1)]
    blocks = [sets.shards[first:end] for first, end in pairwise(edges)]
    return blocks[rank.rank :] + blocks[: rank.rank]


def wait_for_change(sets: ScoreSets, claims: Claims, patience_s: float) -> bool:
    """Wait until another process has written a file or died; false after so long without either."""
    shards, since = sets.unfinished(), time.monotonic()
    before = [_state(sets, claims, shard) for shard in shards]
    while time.monotonic() - since < patience_s:
        time.sleep(POLL_S)
        now = [_state(sets, claims, shard) for shard in shards]
        if now != before or None in now:
            return True
    return False


def _state(sets: ScoreSets, claims: Claims, shard: PairShard) -> tuple[list[str], int] | None:
    """What a shard lacks and how many of its pairs are read; None where nobody is at it."""
    claim = claims.read(shard.index)
    return (sets.absent(shard), claim.rows) if claim is not None and claim.alive else None
