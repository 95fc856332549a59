"""Which files a run needs, which it has, and in which order a rank makes the rest; no torch.

Ranks share the pair shards without talking to each other. Each begins with a block of neighbouring
shards, which have images in common, and then does whatever has no file yet. Two ranks may do the
same shard, which is harmless: both make the same file, and one that is there is never replaced.
A score file that is there is finished; its footer says with which settings it was made.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.atomic import ShardError, remove_partials
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
from data.distributed import Rank, blocks_of, work_order
from data.pairs.schema import PairShard

FACTS = "pairs"
"""The set of `schemas.PAIR_FACTS`, beside the metrics' sets."""


@dataclass(frozen=True, slots=True)
class ScoreSets:
    """The score sets of a run: one folder per metric, one file per pair shard."""

    folder: Path
    shards: tuple[PairShard, ...]
    metrics: Mapping[str, Mapping[str, Any]]
    """Metric -> the settings that decide its scores."""
    latents: LatentFormat | None = None
    """The images' latents, a set that lies beside `scores/`; None where none are wanted."""

    def __post_init__(self) -> None:
        for taken in {FACTS, LATENTS} & self.metrics.keys():
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
        footer = read_settings(path)
        source = footer.get("source")
        if isinstance(source, dict):
            for word in ("sha256", "etag"):  # known only after the pairs were read
                source.pop(word, None)
        refuse_other_settings(path, footer, self.settings(name, shard))
        return True

    def absent(self, shard: PairShard) -> list[str]:
        """The sets whose file for this shard is still to be written; looks into no file."""
        return [name for name in self.names if not self.path(name, shard).exists()]

    def unfinished(self) -> list[PairShard]:
        """The shards that lack a file."""
        return [shard for shard in self.shards if self.absent(shard)]

    def has_latents(self) -> bool:
        """Whether the latents are complete, or none are wanted.

        Raises:
            ShardError: There is a complete set of another format.
        """
        if self.latents is None:
            return True
        manifest = read_manifest(folder := self.folder_of(LATENTS), LATENTS)
        if manifest is not None:
            refuse_other_settings(folder, manifest.settings, self.own_settings(LATENTS))
        return manifest is not None and len(manifest.files) == len(self.shards)

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
            known = read_manifest(folder, name)
            if known is not None:
                refuse_changed(folder, known.files, files, since)
                if known.files == files:
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


def _check_rows(folder: Path, rows: list[int], shards: tuple[PairShard, ...]) -> None:
    for num_rows, shard in zip(rows, shards, strict=True):
        if num_rows != shard.rows:
            raise ShardError(
                f"{folder / part_name(shard.index)} has {num_rows} rows, {shard.name} has "
                f"{shard.rows}; delete it and run the same command again"
            )


def refuse_changed(
    folder: Path, known: list[FileEntry], files: list[FileEntry], since: float
) -> None:
    """Refuse a file that has other bytes than its manifest says and was not written since.

    A lost file may be computed again, with rounding that differs from machine to machine.
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
    own = [sets.shards[number] for number in blocks_of(len(sets.shards), rank)[0]]
    return [ShardTask(shard, missing) for shard in own if (missing := sets.missing(shard))]


def remaining(sets: ScoreSets, rank: Rank) -> Iterator[ShardTask]:
    """This rank's own block, then the others', without the shards that have all of their files.

    Files are looked for when a shard's turn comes. A rank that comes to its end has seen every
    shard finished, or has done it.

    Raises:
        ShardError: A finished file is torn, or was made with other settings.
    """
    for number in work_order(len(sets.shards), rank):
        shard = sets.shards[number]
        if sets.absent(shard) and (missing := sets.missing(shard)):
            yield ShardTask(shard, missing)
