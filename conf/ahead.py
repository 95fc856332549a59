"""Checks the paths of every stage of a command before the first stage does its work.

`make eval` generates pairs, labels, trains and judges, which may take days: a mistyped prompt file
is told at the start. Each stage's `run.check` says what can be known before the stages before it
have run.
"""

from importlib import import_module

from conf.job import Job
from data.distributed import Rank

STAGES = ("generate", "label", "train", "evaluate")
"""In the order in which they run."""


def check_later_stages(stage: str, job: Job) -> None:
    """Check what the stages after this one need, up to `goal`; one process does it for all.

    Raises:
        ValueError: A model, a prompt set or a judge of a later stage cannot be used.
    """
    if job.goal is None or stage not in STAGES or not Rank.from_environment().is_first:
        return
    for later in STAGES[STAGES.index(stage) + 1 : STAGES.index(job.goal.value) + 1]:
        import_module(f"{later}.run").check(job)
