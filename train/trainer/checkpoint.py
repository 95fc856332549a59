"""The format of checkpoints: all that is needed to resume.

A checkpoint is written into a hidden folder, hashed, described by `manifest.json`, and renamed: a
folder named `step-...` is whole, or was damaged later, which its hashes reveal. DeepSpeed's shards
are pickles, so they are opened only after their hashes are checked.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.artifacts.atomic import ShardError, fsync, sha256_of, write_json
from data.artifacts.manifest import MANIFEST
from train.distributed.deepspeed_engine import Policy, sizes
from train.distributed.world import World
from train.dpo.reference import Reference
from train.loader.order import Position

STATE = "state.json"
NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a run stands, besides its weights."""

    step: int
    """Optimizer steps done."""
    position: Position
    """The next global batch."""
    reference_version: int
    world: int
    """Ranks that wrote the checkpoint."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:07d}"


# --- writing -------------------------------------------------------------------------------------


def save_checkpoint(
    root: Path, state: State, policy: Policy, reference: Reference, world: World, keep: int
) -> Path:
    """Write the checkpoint of a step, all ranks together, and delete all but the last `keep`."""
    final = checkpoint_folder(root, state.step)
    partial = final.with_name(f".{final.name}.partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    policy.save(partial)
    shards = reference_shards(reference, world)
    save_file(shards, reference_file(partial, world.rank, world.world_size))
    world.barrier()  # every rank's files are written before any is counted
    if world.rank == 0:
        write_json(partial / STATE, asdict(state))
        write_json(partial / MANIFEST, {"files": _describe_files(partial)})
        if final.exists():  # damaged, or the run would not have done this step again
            shutil.rmtree(final)
        partial.rename(final)
        fsync(root)
        _delete_old(root, keep)
    world.barrier()
    return final


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Force every file below a folder to disk; return their sizes and SHA-256 by name."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        fsync(path)
        name = path.relative_to(folder).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return entries


def _delete_old(root: Path, keep: int) -> None:
    for step in steps_saved(root)[:-keep]:
        shutil.rmtree(checkpoint_folder(root, step))


# --- the reference's shards ----------------------------------------------------------------------


def reference_file(folder: Path, rank: int, world_size: int) -> Path:
    """The file with a rank's shard of the reference."""
    return folder / f"reference-{rank:05d}-of-{world_size:05d}.safetensors"


def reference_shards(reference: Reference, world: World) -> dict[str, Tensor]:
    """Return this rank's shard of each of the reference's parameters, flat; alike at every stage.

    A shard is a stage 3 partition without its padding; if the rank has whole parameters, it is cut
    from them. So a checkpoint has the reference once, and any number of ranks can read it.
    """
    numels = sizes(reference.parameters)
    shards = {}
    for name, part in (reference.parts() | reference.average).items():
        first, length = shard_bounds(numels[name], world.rank, world.world_size)
        start = 0 if reference.sharded else first
        shards[name] = part[start : start + length].detach().to("cpu", copy=True)
    return shards


def shard_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """First element and length of a rank's shard of `numel` elements, cut as by ZeRO stage 3."""
    size = -(-numel // world_size)
    first = min(rank * size, numel)
    return first, min(size, numel - first)


def load_reference(folder: Path, state: State, reference: Reference, world: World) -> None:
    """Read the reference, written by any number of ranks, into this rank's part of it."""
    files = [load_file(reference_file(folder, rank, state.world)) for rank in range(state.world)]
    numels = sizes(reference.parameters)
    for name, part in reference.parts().items():
        whole = torch.cat([shards[name] for shards in files])
        if reference.sharded:
            first, length = shard_bounds(numels[name], world.rank, world.world_size)
            whole = whole[first : first + length]
        part[: len(whole)].copy_(whole)
        if name in reference.average:
            reference.average[name][: len(whole)].copy_(whole)
    reference.version = state.reference_version


# --- finding and reading -------------------------------------------------------------------------


def steps_saved(root: Path) -> list[int]:
    """Steps that have a checkpoint folder, in order."""
    matches = [NAME.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match.group(1)) for match in matches if match)


def latest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose hashes hold, and what is wrong with newer ones.

    Raises:
        ShardError: There are checkpoints, and every one is damaged.
    """
    problems: list[str] = []
    for step in reversed(steps_saved(root)):
        folder = checkpoint_folder(root, step)
        problem = find_corruption(folder)
        if problem is None:
            return folder, problems
        problems.append(problem)
    if problems:
        raise ShardError(
            f"no checkpoint can be used: {'; '.join(problems)}. "
            f"Delete {root} to train from the beginning"
        )
    return None, problems


def find_corruption(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, or return None."""
    try:
        entries: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{folder}/{MANIFEST} cannot be read ({error})"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            return f"{path} has other bytes than {MANIFEST} says"
    return None


def load_state(folder: Path) -> State:
    """Read where the run stood."""
    value = json.loads((folder / STATE).read_text())
    return State(**value | {"position": Position(**value["position"])})
