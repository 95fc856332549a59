"""Refreshing the reference while training: the paper's dynamic reference."""

from typing import Any

from train.trainer.trainer import Callback, Trainer


class RefreshReference(Callback):
    """Moves the reference to the policy every `train.reference.every` steps."""

    __slots__ = ()

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Refresh the reference if it is time."""
        if trainer.reference.due(trainer.state.step):
            trainer.reference.refresh(trainer.policy)
            trainer.state.last_refresh = trainer.state.step
