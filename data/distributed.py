"""Who this process is among those that the launcher started: the one reader of its variables.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE and LOCAL_RANK; srun sets Slurm's own, which
`adopt_srun` translates. Without a launcher a process is alone.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

PORTS = (15_000, 16_000)
"""First port for rank 0 to listen at, and how many: below those that systems hand out."""


MOST_WORKERS = 8
"""Threads of a process, if no setting says more: with more the main thread is waited for."""


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those of the launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of the process on its machine: its GPU."""
    local_world_size: int = 1
    """Processes on this machine, as far as the launcher says."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Rank":
        """Read what the launcher set; nothing means a single process.

        Raises:
            ValueError: The values contradict each other.
        """
        rank, world_size, local_rank = (
            _number(environment, name, default)
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if rank >= world_size:
            raise ValueError(
                f"RANK={rank} is not below WORLD_SIZE={world_size}; start with torchrun or srun"
            )
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)
        return cls(rank, world_size, local_rank, max(1, local_world_size))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(
            f"the environment has {name}={text!r}, needed is a number; start with torchrun or "
            f"srun, or unset {name}"
        )
    return int(text)


def num_workers(wanted: int | None, rank: Rank | None = None, *, most: int = MOST_WORKERS) -> int:
    """Workers of this process: as many as wanted, or its part of the machine's cores."""
    if wanted is not None:
        return wanted
    rank = rank or Rank.from_environment()
    return max(1, min(most, len(os.sched_getaffinity(0)) // rank.local_world_size))


def work_order(count: int, rank: Rank) -> list[int]:
    """All parts of a work by number: this rank's block, then the others' in an order of its own.

    The owner of a block walks forwards, its helpers backwards, each from another place, so that
    the block of a dead or slow rank is shared by all who have finished theirs.
    """
    own, *others = blocks_of(count, rank)
    order = list(own)
    for distance, block in enumerate(others):
        backwards, first = block[::-1], len(block) * distance // len(others)
        order += [*backwards[first:], *backwards[:first]]
    return order


def blocks_of(count: int, rank: Rank) -> list[range]:
    """The numbers below `count` in a block for each rank, this rank's first."""
    edges = [count * number // rank.world_size for number in range(rank.world_size + 1)]
    blocks = [range(first, end) for first, end in pairwise(edges)]
    return blocks[rank.rank :] + blocks[: rank.rank]


def adopt_srun(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what torchrun would set, where srun started the process and no other launcher did.

    A batch script has some of Slurm's variables without being one of several processes; a job step
    has SLURM_STEP_NUM_TASKS.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    first, count = PORTS
    port = first + int(environment.get("SLURM_JOB_ID", "0")) % count
    environment.setdefault("MASTER_ADDR", first_machine(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(port))


def be_alone(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what torchrun would set for a single process, where no launcher started it."""
    if "RANK" in environment:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def first_machine(machines: str) -> str:
    """The first of a list as Slurm writes it: gpu[003-007,12],cpu1 begins with gpu003."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", machines).split(",")[0]


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher passes the local rank as an argument, too, which is no setting."""
    return [text for text in arguments if not re.fullmatch(r"--local[-_]rank=\d+", text)]
