"""The reference model and its refresh rule.

A refresh touches only what a rank has: under ZeRO 0 to 2 the whole model, under
stage 3 the rank's own partition of every parameter; with LoRA, of the adapter alone. Nothing is
gathered or sent, so a snapshot costs one copy of memory bandwidth and no extra peak memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Objective, Precision, ReferenceSpec, Refresh, TrainSpec
from train.distributed.deepspeed_engine import Policy, partitions, release, sharded_reference
from train.distributed.world import World
from train.models.lora import as_reference, of_reference


@dataclass(slots=True)
class Reference:
    """The model that the policy is compared with."""

    spec: ReferenceSpec
    denoiser: Any
    """The model, DeepSpeed's engine around it, or the policy's with another adapter; None where
    the objective has no reference."""
    parameters: dict[str, nn.Parameter]
    """What a refresh moves, by the names of the policy's parameters; empty for LoRA's frozen
    reference, which is the base."""
    engine: Any = None
    """Under stage 3, the DeepSpeed engine that partitions the parameters."""
    version: int = 0
    """How many times it was refreshed."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """For `ema` in bf16: this rank's parts in fp32, because bf16 would round small moves away."""

    @property
    def sharded(self) -> bool:
        """Whether a rank has only its part of each parameter."""
        return self.engine is not None

    def due(self, step: int) -> bool:
        """Whether to refresh after this many optimizer steps."""
        return self.spec.refresh is not Refresh.frozen and step % self.spec.every == 0

    @torch.no_grad()
    def refresh(self, policy: Policy) -> None:
        """Move the reference to the policy: all the way for `snapshot`, by `alpha` for `ema`.

        The policy's weights are its fp32 master weights rounded to the model's precision, so after
        a snapshot both compute the same numbers bit for bit.
        """
        ours, theirs = self.parts(), partitions(policy.trained)
        alpha = self.spec.alpha if self.spec.refresh is Refresh.ema else 1.0
        for name, part in ours.items():
            move(self.average.get(name, part), theirs[name], alpha)
            if name in self.average:
                part.copy_(self.average[name])
        self.version += 1

    def parts(self) -> dict[str, Tensor]:
        """This rank's part of each parameter; drops gathered parameters, which would be stale."""
        if self.sharded:
            release(self.engine)
        return partitions(self.parameters)


def move(target: Tensor, source: Tensor, alpha: float) -> None:
    """Set target to (1 - alpha) target + alpha source, in place (TR-DPO); alpha 1 copies."""
    if alpha == 1.0:
        target.copy_(source)
    else:
        target.lerp_(source.to(target.dtype), alpha)


def make_reference(
    base: Callable[[], nn.Module], policy: Policy, spec: TrainSpec, world: World
) -> Reference:
    """Make the first reference: the base model, partitioned like the policy.

    `base` loads the denoiser; it is called only if the reference has one of its own.
    """
    if spec.objective.kind is Objective.mapo:  # reference-free: nothing is loaded or saved
        return Reference(spec.reference, None, {})
    sharded = spec.zero.stage == 3
    if spec.lora.rank:
        module = policy.module
        engine = policy.engine if sharded else None
        reference = Reference(spec.reference, as_reference(module), of_reference(module), engine)
    else:
        module = base().requires_grad_(requires_grad=False)
        engine = sharded_reference(module, spec, world) if sharded else None
        denoiser = module if engine is None else engine
        reference = Reference(spec.reference, denoiser, dict(module.named_parameters()), engine)
    if spec.reference.refresh is Refresh.ema and spec.precision is not Precision.fp32:
        reference.average = {name: part.float() for name, part in reference.parts().items()}
    return reference
