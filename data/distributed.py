"""Who this process is among those that the launcher started."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those of the launcher."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Number of the process on its machine: its GPU."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Rank":
        """Read what the launcher set; nothing means a single process.

        Raises:
            ValueError: The values contradict each other.
        """
        rank, world, local = (
            int(environment.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        if not 0 <= rank < world:
            raise ValueError(
                f"RANK={rank} is not below WORLD_SIZE={world}; start with torchrun or srun"
            )
        return cls(rank, world, local)
