"""What follows the policy after a step: the reference, its average, and beta."""

from typing import Any

from train.dpo.auto_beta import adjusted
from train.trainer.trainer import Callback, Trainer


class RefreshReference(Callback):
    """Moves the reference to the policy every `train.reference.every` steps."""

    __slots__ = ()

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Refresh the reference if it is time."""
        if trainer.reference.due(trainer.state.step):
            trainer.reference.refresh(trainer.policy)
            trainer.state.last_refresh = trainer.state.step


class UpdateAverage(Callback):
    """Moves the policy's average to its weights after each step, with `train.ema`."""

    __slots__ = ()

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Move the average."""
        if trainer.average is not None:
            trainer.average.update(trainer.policy, trainer.state.step)


class AdjustBeta(Callback):
    """Moves beta after each step, for `train.beta=auto`."""

    __slots__ = ()

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Set the next step's beta from this step's mean gradient factor."""
        spec, state = trainer.run.train, trainer.state
        warming_up = state.step < spec.warmup
        state.beta = adjusted(
            state.beta, line["gradient_factor"], spec.auto_beta, warming_up=warming_up
        )
