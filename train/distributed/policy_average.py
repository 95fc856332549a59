"""The policy's average: an exponential moving average of its fp32 weights (`train.ema`).

A rank averages the part of the master weights that it has anyway, so nothing is sent, and the
average is the same whatever the ZeRO stage. In a checkpoint each rank has a file with its parts and
where they begin, from which any number of ranks can read theirs.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.distributed.deepspeed_engine import MasterPart, Policy, shapes
from train.distributed.world import World


@dataclass(frozen=True, slots=True)
class PolicyAverage:
    """This rank's parts of the average."""

    decay: float
    """Most of the average that a step keeps, in (0, 1)."""
    parts: Mapping[str, MasterPart]
    """By the names of the policy's parameters; without those of which this rank has nothing."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of all whole parameters."""
    replicated: bool
    """Whether every rank has all (stage 0); then the first writes them."""

    @torch.no_grad()
    def update(self, policy: Policy, step: int) -> None:
        """Set the average to d average + (1 - d) weights, after `step` optimizer steps.

        d is `decay_after`.
        """
        now = policy.master_parts()
        kept = decay_after(step, self.decay)
        averages = [part.values for part in self.parts.values()]
        torch._foreach_lerp_(averages, [now[name].values for name in self.parts], 1 - kept)

    def save(self, folder: Path, world: World) -> None:
        """Write this rank's file of a checkpoint."""
        own = {} if self.replicated and world.rank else self.parts
        starts = {name: part.start for name, part in own.items()}
        values = {name: part.values.to("cpu") for name, part in own.items()}
        path = average_file(folder, world.rank, world.world_size)
        save_file(values, path, {"starts": json.dumps(starts)})

    def load(self, folder: Path) -> None:
        """Read this rank's parts from a checkpoint that any number of ranks wrote."""
        with AverageFiles(folder) as files:
            for name, part in self.parts.items():
                part.values.copy_(files.read(name, part.start, len(part.values)))

    def whole(self, folder: Path) -> dict[str, Tensor]:
        """Read all of it from a checkpoint."""
        with AverageFiles(folder) as files:
            return {
                name: files.read(name, 0, torch.Size(shape).numel()).view(shape)
                for name, shape in self.shapes.items()
            }


def make_average(policy: Policy, decay: float) -> PolicyAverage | None:
    """An average that begins at the policy's present weights; None without `train.ema`."""
    if not decay:
        return None
    parts = {
        name: MasterPart(part.start, part.values.detach().clone())
        for name, part in policy.master_parts().items()
    }
    return PolicyAverage(decay, parts, shapes(policy.trained), policy.stage == 0)


def decay_after(step: int, decay: float) -> float:
    """How much of the average the update after `step` optimizer steps keeps, in (0, 1).

    min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage has it, and
    diffusers' EMAModel one step later: the first averages are of few steps, so that those of a
    short run are not mostly of the base.
    """
    return min(decay, (1 + step) / (10 + step))


def average_file(folder: Path, rank: int, world_size: int) -> Path:
    """The file of a checkpoint with a rank's parts of the average."""
    return folder / f"average-{rank:05d}-of-{world_size:05d}.safetensors"


class AverageFiles(ExitStack):
    """The open files of all ranks of a checkpoint; a context."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        paths = sorted(folder.glob("average-*.safetensors"))
        self.files = [self.enter_context(safe_open(path, framework="pt")) for path in paths]
        self.starts = [json.loads(file.metadata()["starts"]) for file in self.files]

    def read(self, name: str, first: int, length: int) -> Tensor:
        """Elements of a flat parameter; no others are read."""
        pieces = {}
        for file, starts in zip(self.files, self.starts, strict=True):
            if name not in starts:
                continue
            values, start = file.get_slice(name), starts[name]
            low, high = max(first, start), min(first + length, start + values.get_shape()[0])
            if low < high:
                pieces[low] = values[low - start : high - start]
        return torch.cat([pieces[low] for low in sorted(pieces)])
