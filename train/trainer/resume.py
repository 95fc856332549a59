"""Resuming a run from its newest valid checkpoint, and writing checkpoints while it trains."""

from pathlib import Path
from typing import Any

from rich.console import Console

from data.artifacts.atomic import remove
from train.trainer.checkpoint import (
    State,
    latest_valid,
    load_reference,
    load_state,
    save_checkpoint,
)
from train.trainer.trainer import Callback, RunState, Trainer

SCRATCH = ".universal"
"""Where shards are converted when the number of processes has changed."""


def resume(trainer: Trainer, console: Console) -> None:
    """Continue from the newest checkpoint whose hashes hold, if there is one.

    Raises:
        ShardError: There are checkpoints, and every one is damaged.
    """
    run, world = trainer.run, trainer.world
    newest = world.broadcast(_newest(run.folder) if world.rank == 0 else None)
    if isinstance(newest, ValueError):
        raise newest
    folder, problems = newest
    for problem in problems:
        console.print(f"[yellow]checkpoint left out:[/] {problem}")
    if folder is None:
        return
    state = load_state(folder)
    if state.world == world.world_size:
        trainer.policy.load(folder)
    else:
        console.print(f"written by {state.world} processes, now {world.world_size}")
        trainer.policy.load_from_other_ranks(folder, run.folder / SCRATCH)
    load_reference(folder, state, trainer.reference, world)
    if trainer.average is not None:
        trainer.average.load(folder)
    every = run.train.reference.every
    last_refresh = state.step - state.step % every if state.reference_version else 0
    trainer.state = RunState(state.beta, state.step, state.position, last_refresh, folder)
    console.print(f"resuming after step {state.step} from {folder}")


def _newest(folder: Path) -> Any:
    """What rank 0 sends to all ranks: `latest_valid`, or its error as a value."""
    for left_over in (*folder.glob(".*.partial"), *folder.glob(SCRATCH)):
        remove(left_over)  # from a run that was killed
    try:
        return latest_valid(folder)
    except ValueError as error:
        return error


class SaveCheckpoints(Callback):
    """Writes a checkpoint every `train.checkpoint_every` steps and after the last."""

    __slots__ = ()

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Write a checkpoint if it is time."""
        spec, run_state = trainer.run.train, trainer.state
        if run_state.step % spec.checkpoint_every and run_state.step != spec.steps:
            return
        state = State(
            step=run_state.step,
            beta=run_state.beta,
            position=run_state.position,
            reference_version=trainer.reference.version,
            world=trainer.world.world_size,
        )
        run_state.checkpoint = save_checkpoint(
            trainer.run.folder,
            state,
            trainer.policy,
            trainer.reference,
            trainer.world,
            spec.keep,
            trainer.average,
        )
