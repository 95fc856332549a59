"""Who this process is among those of the launcher, in torchrun's words whatever the launcher."""

import re
from collections.abc import MutableMapping, Sequence

PORTS = (15_000, 16_000)
"""First port for rank 0 to listen at, and how many: below those that systems hand out."""


def adopt_srun(environment: MutableMapping[str, str]) -> None:
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


def first_machine(machines: str) -> str:
    """The first of a list as Slurm writes it: gpu[003-007,12],cpu1 begins with gpu003."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", machines).split(",")[0]


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher says the local rank as an argument, too, which is no setting."""
    return [text for text in arguments if not re.fullmatch(r"--local[-_]rank=\d+", text)]
