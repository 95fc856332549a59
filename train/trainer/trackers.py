"""Shows metrics as curves: in TensorBoard, and in Weights & Biases if `train.wandb` is set."""

from collections.abc import Mapping
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from train.identity import TrainRun


@runtime_checkable
class Tracker(Protocol):
    """Something that shows numbers and images over steps."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show a step's numbers."""

    def log_images(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Show an image."""

    def close(self, *, failed: bool) -> None:
        """Finish; `failed` says that the run ended with an error."""


class TensorBoard:
    """Event files below the run's folder."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports long, only rank 0 needs it

        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show a step's numbers."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_images(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Show an image."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run of the project; the same folder resumes the same run.

    Steps that are repeated after a kill are sent again: the newest value of a step counts.
    """

    def __init__(self, run: TrainRun) -> None:
        import wandb

        assert run.train.wandb is not None
        self.wandb = wandb
        name = blake2b(str(run.folder.resolve()).encode(), digest_size=8).hexdigest()
        self.run = wandb.init(
            project=run.train.wandb,
            name=run.folder.parent.name,
            id=name,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show a step's numbers."""
        self.run.log({**values, "step": step})

    def log_images(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Show an image."""
        self.run.log({name: self.wandb.Image(pixels), "step": step})

    def close(self, *, failed: bool) -> None:
        """Send what is left."""
        self.run.finish(exit_code=int(failed))


def check_trackers(run: TrainRun) -> None:
    """Check that the trackers can be opened.

    Raises:
        ValueError: `train.wandb` is set and Weights & Biases is not installed.
    """
    if run.train.wandb is not None and find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb={run.train.wandb} needs the package wandb, which is not installed: "
            "`.venv/bin/uv pip install --python .venv/bin/python wandb`, or leave train.wandb=null"
        )


def open_trackers(run: TrainRun, done: int) -> list[Tracker]:
    """Open every tracker of a run that stands after `done` steps."""
    trackers: list[Tracker] = [TensorBoard(run.folder / "tensorboard", done)]
    if run.train.wandb is not None:
        trackers.append(WeightsAndBiases(run))
    return trackers
