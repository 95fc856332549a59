"""What a run needs, what is there, and who does the rest; imports no torch.

Ranks share the pair shards without talking to each other: rank r of w takes shards r, r + w, ...
A score file that is there is finished; its footer says with which settings it was made.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.latents import KIND as LATENTS
from data.latents import LatentFormat
from data.pairs import PairShard
from data.shards import (
    Manifest,
    ShardError,
    describe,
    part_name,
    read_manifest,
    read_settings,
    refuse_other_settings,
    write_manifest,
)

FACTS = "pairs"
"""The set of `tables.PAIR_FACTS`, beside the metrics' sets."""
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those of the launcher (torchrun, srun, DeepSpeed's)."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Number of the process on its machine: its GPU."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Rank":
        """Read RANK, WORLD_SIZE and LOCAL_RANK; absent ones mean a single process.

        Raises:
            ValueError: The values contradict each other.
        """
        rank = int(environment.get("RANK", "0"))
        world = int(environment.get("WORLD_SIZE", "1"))
        if not 0 <= rank < world:
            raise ValueError(f"RANK={rank} is not below WORLD_SIZE={world}; start with torchrun")
        return cls(rank, world, int(environment.get("LOCAL_RANK", "0")))


@dataclass(frozen=True, slots=True)
class ScoreSets:
    """The score sets of a run: one folder per metric, one file per pair shard."""

    folder: Path
    shards: tuple[PairShard, ...]
    metrics: Mapping[str, Mapping[str, Any]]
    """Metric -> the settings that decide its scores."""
    latents: LatentFormat | None = None
    """The pictures' latents, a set that lies beside `scores/`; None where they are not asked."""

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
        found = read_settings(path)
        found.get("source", {}).pop("sha256", None)  # known only after the pairs were read
        refuse_other_settings(path, found, self.settings(name, shard))
        return True

    def all_there(self) -> bool:
        """Whether every set has every file (their settings were checked by `missing`)."""
        return not self.absent()

    def absent(self) -> int:
        """How many files are still to be written, by this process or another."""
        return sum(
            not self.path(name, shard).exists() for name in self.names for shard in self.shards
        )

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
            ShardError: A file, perhaps another rank's, is torn or was made with other settings.
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
            if found is not None and found.files == files:
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
        if re.fullmatch(r"\..+\.\d+", path.name) and path.stat().st_mtime < since:
            path.unlink(missing_ok=True)


def _check_rows(folder: Path, rows: list[int], shards: tuple[PairShard, ...]) -> None:
    for found, shard in zip(rows, shards, strict=True):
        if found != shard.rows:
            raise ShardError(
                f"{folder / part_name(shard.index)} has {found} rows, {shard.name} has "
                f"{shard.rows}; delete it and run the same command again"
            )


@dataclass(frozen=True, slots=True)
class Work:
    """A pair shard and the sets to write for it."""

    shard: PairShard
    sets: tuple[str, ...]


def plan(sets: ScoreSets, rank: Rank) -> list[Work]:
    """This rank's unfinished shards.

    Raises:
        ShardError: A finished file is torn, or was made with other settings.
    """
    mine = sets.shards[rank.rank :: rank.world]
    return [Work(shard, todo) for shard in mine if (todo := sets.missing(shard))]


def wait_for_others(sets: ScoreSets, patience_s: float, tell: Callable[[int], None]) -> None:
    """Wait until the other ranks have written their files, telling how many are absent.

    Raises:
        ValueError: No file came for `patience_s` seconds.
    """
    absent, since = sets.absent(), time.monotonic()
    while absent:
        tell(absent)
        time.sleep(POLL_S)
        if (now_absent := sets.absent()) != absent:
            absent, since = now_absent, time.monotonic()
        elif time.monotonic() - since > patience_s:
            raise ValueError(
                f"{absent} score files of other processes are missing and none came for "
                f"{patience_s:.0f} s (label.patience_s); see whether they failed, then run the "
                "same command again: finished shards are kept"
            )
