"""The format of checkpoints: all that is needed to resume.

A checkpoint is written into a hidden folder, hashed, described by `manifest.json`, and renamed: a
folder named `step-...` is whole, or was damaged later, which its hashes reveal. DeepSpeed's shards
are pickles, so they are opened only after their hashes are checked.
"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.artifacts.atomic import ShardError, fsync, read_json, remove, sha256_of, write_json
from data.artifacts.manifest import MANIFEST
from train.distributed.deepspeed_engine import Policy, sizes
from train.distributed.policy_average import PolicyAverage
from train.distributed.world import World
from train.dpo.auto_beta import AutoBeta
from train.dpo.reference import Reference
from train.loader.order import Position

STATE = "state.json"
NAME = re.compile(r"step-(\d{7,})")
OF_RANK = re.compile(r"(?:zero_pp_rank_|reference-|average-)(\d+)")
"""In the name of a file that one rank wrote: DeepSpeed's shards, the reference's, the average's."""
THREADS = 4
"""Files that a rank hashes at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a run stands, besides its weights."""

    step: int
    """Optimizer steps done."""
    position: Position
    """The next global batch."""
    beta: AutoBeta
    """That of the next step."""
    reference_version: int
    world: int
    """Ranks that wrote the checkpoint."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:07d}"


# --- writing -------------------------------------------------------------------------------------


def save_checkpoint(
    root: Path,
    state: State,
    policy: Policy,
    reference: Reference,
    world: World,
    keep: int,
    average: PolicyAverage | None = None,
) -> Path:
    """Write the checkpoint of a step, all ranks together, and delete all but the last `keep`."""
    final = checkpoint_folder(root, state.step)
    partial = final.with_name(f".{final.name}.partial")
    if world.rank == 0:
        remove(partial)
        partial.mkdir(parents=True)
    world.barrier()
    policy.save(partial)
    shards = reference_shards(reference, world)
    save_file(shards, reference_file(partial, world.rank, world.world_size))
    if average is not None:
        average.save(partial, world)
    if world.rank == 0:
        write_json(partial / STATE, asdict(state))
    world.barrier()  # every rank's files are written before any is counted
    entries = world.all_gather(describe_own_files(partial, world))
    if world.rank == 0:
        files = {name: entry for part in entries for name, entry in part.items()}
        write_json(partial / MANIFEST, {"files": dict(sorted(files.items()))})
        if final.exists():  # damaged, or the run would not have done this step again
            remove(final)
        partial.rename(final)
        fsync(root)
        _delete_old(root, keep)
    world.barrier()
    return final


def describe_own_files(folder: Path, world: World) -> dict[str, dict[str, Any]]:
    """Force this rank's files below a folder to disk; return their sizes and SHA-256 by name.

    A rank's own files are still in its machine's memory. Those that name no rank are the first's.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    own = [name for name in names if owner(name) % world.world_size == world.rank]

    def entry(name: str) -> dict[str, Any]:
        path = folder / name
        fsync(path)
        return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}

    with ThreadPoolExecutor(THREADS) as threads:  # hashing releases the GIL
        return dict(zip(own, threads.map(entry, own), strict=True))


def owner(name: str) -> int:
    """The rank that wrote a file of a checkpoint, by its name; 0 where it names none."""
    match = OF_RANK.search(name)
    return int(match.group(1)) if match else 0


def _delete_old(root: Path, keep: int) -> None:
    for step in steps_saved(root)[:-keep]:
        remove(checkpoint_folder(root, step))


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
    numels = sizes(reference.parameters)
    with ExitStack() as stack:
        paths = [reference_file(folder, rank, state.world) for rank in range(state.world)]
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for name, part in reference.parts().items():
            first, length = 0, numels[name]
            if reference.sharded:
                first, length = shard_bounds(numels[name], world.rank, world.world_size)
            wanted = read_shard(files, name, numels[name], first, length)
            part[:length].copy_(wanted)
            if name in reference.average:
                reference.average[name][:length].copy_(wanted)
    reference.version = state.reference_version


def read_shard(files: Sequence[Any], name: str, numel: int, first: int, length: int) -> Tensor:
    """Elements of a parameter from the open files of all shards; no others are read."""
    pieces = []
    for rank, file in enumerate(files):
        start, size = shard_bounds(numel, rank, len(files))
        low, high = max(first, start), min(first + length, start + size)
        if low < high:
            pieces.append(file.get_slice(name)[low - start : high - start])
    return torch.cat(pieces) if pieces else torch.empty(0)


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
        entries = read_json(folder / MANIFEST, "it describes the others").get("files")
    except ShardError as error:
        return str(error)
    if not isinstance(entries, dict) or STATE not in entries:
        return f"{folder}/{MANIFEST} does not list the files of a checkpoint"
    with ThreadPoolExecutor(THREADS) as threads:
        problems = threads.map(lambda name: _problem(folder / name, entries[name]), entries)
        if problem := next((problem for problem in problems if problem), None):
            return problem
    return _incompleteness(folder, entries)


def _problem(path: Path, entry: Any) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    actual = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return None if entry == actual else f"{path} has other bytes than {MANIFEST} says"


def _incompleteness(folder: Path, entries: Mapping[str, Any]) -> str | None:
    """What a manifest whose hashes hold does not list, or None."""
    try:
        state = load_state(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{folder / STATE} is not the state of a run ({error})"
    if checkpoint_folder(folder.parent, state.step) != folder:
        return f"{folder} has the state of step {state.step}"
    needed = (reference_file(folder, rank, state.world).name for rank in range(state.world))
    lacking = next((name for name in needed if name not in entries), None)
    return f"{folder}/{MANIFEST} does not list {lacking}" if lacking else None


def load_state(folder: Path) -> State:
    """Read where the run stood."""
    value = json.loads((folder / STATE).read_text())
    parts = {"position": Position(**value["position"]), "beta": AutoBeta(**value["beta"])}
    return State(**value | parts)
