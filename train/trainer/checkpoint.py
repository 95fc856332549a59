"""All that is needed to go on.

A checkpoint is written into a hidden folder, hashed, described by `manifest.json`, and renamed: a
folder named `step-...` is whole, or was damaged later, which its hashes tell. DeepSpeed's shards
are pickles, so they are opened only after the hashes hold.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.artifacts.atomic import ShardError, sha256_of, write_json
from data.artifacts.manifest import MANIFEST
from train.distributed.deepspeed_engine import Policy, World, sizes
from train.dpo.reference import Reference
from train.loader.sampler import Position

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
    """Write the checkpoint of a step, all ranks together; of older ones the last few are kept."""
    final = checkpoint_folder(root, state.step)
    partial = final.with_name(f".{final.name}.partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    policy.save(partial)
    shares = reference_shares(reference, world)
    save_file(shares, reference_file(partial, world.rank, world.size))
    world.barrier()  # every rank's files are written before any is counted
    if world.rank == 0:
        write_json(partial / STATE, asdict(state))
        write_json(partial / MANIFEST, {"files": _describe_files(partial)})
        if final.exists():  # damaged, or the run would not have done this step again
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)
        _forget(root, keep)
    world.barrier()
    return final


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below a folder, each forced to disk first."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        name = path.relative_to(folder).as_posix()
        found[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _forget(root: Path, keep: int) -> None:
    for step in steps_saved(root)[:-keep]:
        shutil.rmtree(checkpoint_folder(root, step))


# --- the reference's shares ----------------------------------------------------------------------


def reference_file(folder: Path, rank: int, world: int) -> Path:
    """The share of the reference that a rank wrote."""
    return folder / f"reference-{rank:05d}-of-{world:05d}.safetensors"


def reference_shares(reference: Reference, world: World) -> dict[str, Tensor]:
    """This rank's share of every parameter of the reference, flat; cut alike at every ZeRO stage.

    A share is a stage 3 partition without its padding; where the rank holds everything, it is cut
    from that. So a checkpoint has the reference once, and any number of ranks can read it.
    """
    numels = sizes(reference.parameters)
    found = {}
    for name, part in (reference.parts() | reference.average).items():
        first, length = share_bounds(numels[name], world.rank, world.size)
        start = 0 if reference.sharded else first
        found[name] = part[start : start + length].detach().to("cpu", copy=True)
    return found


def share_bounds(numel: int, rank: int, world: int) -> tuple[int, int]:
    """First element and length of a rank's share of `numel` elements: DeepSpeed's stage 3 cut."""
    share = -(-numel // world)
    first = min(rank * share, numel)
    return first, min(share, numel - first)


def load_reference(folder: Path, state: State, reference: Reference, world: World) -> None:
    """Read the reference, written by any number of ranks, into what this rank holds of it."""
    files = [load_file(reference_file(folder, rank, state.world)) for rank in range(state.world)]
    numels = sizes(reference.parameters)
    for name, part in reference.parts().items():
        whole = torch.cat([shares[name] for shares in files])
        if reference.sharded:
            first, length = share_bounds(numels[name], world.rank, world.size)
            whole = whole[first : first + length]
        part[: len(whole)].copy_(whole)
        if name in reference.average:
            reference.average[name][: len(whole)].copy_(whole)
    reference.version = state.reference_version


# --- finding and reading -------------------------------------------------------------------------


def steps_saved(root: Path) -> list[int]:
    """Steps that have a checkpoint folder, in order."""
    found = [NAME.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match.group(1)) for match in found if match)


def latest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose hashes hold, and what is wrong with the newer ones.

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
    """What is wrong with a checkpoint's files, or None."""
    try:
        listed: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{folder}/{MANIFEST} cannot be read ({error})"
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            return f"{path} has other bytes than {MANIFEST} says"
    return None


def load_state(folder: Path) -> State:
    """Where the run stood."""
    value = json.loads((folder / STATE).read_text())
    return State(**value | {"position": Position(**value["position"])})
