"""The optimizer of the settings, and whether it can be used here."""

from collections.abc import Iterable
from importlib import import_module

import torch
from torch import nn

from train.config import Offload, OptimizerKind, TrainSpec
from train.distributed.world import World
from train.models.extras import check_bitsandbytes

IN_8_BITS = {
    OptimizerKind.adamw8bit: "AdamW8bit",
    OptimizerKind.paged_adamw8bit: "PagedAdamW8bit",
}
"""Classes of `bitsandbytes.optim`."""


def check_optimizer(spec: TrainSpec, world: World) -> None:
    """Refuse an optimizer that this machine or ZeRO cannot run, before any weight is loaded.

    Raises:
        ValueError: Says what is missing, or which setting to change.
    """
    kind = spec.optimizer.kind
    what = f"train.optimizer.kind={kind.value}"
    if kind is OptimizerKind.adafactor and spec.zero.stage:
        raise ValueError(
            f"{what} keeps the sums of each weight's rows and columns, but zero.stage="
            f"{spec.zero.stage} cuts the weights into flat parts that have none; choose "
            "zero=stage0, or optimizer=adamw"
        )
    if kind not in IN_8_BITS:
        return
    check_bitsandbytes(what, "optimizer=adamw")
    if world.device.type != "cuda" or spec.zero.offload is not Offload.none:
        raise ValueError(
            f"{what} takes its steps on a GPU, but train.device is {world.device.type} and "
            f"train.zero.offload={spec.zero.offload.value}; choose optimizer=adamw"
        )


def make_optimizer(parameters: Iterable[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimizer of the settings, for parameters that are still whole."""
    constants = spec.optimizer
    kind, decay = constants.kind, constants.weight_decay
    if kind is OptimizerKind.adafactor:
        return torch.optim.Adafactor(parameters, lr=spec.lr, weight_decay=decay)
    first, second = constants.betas
    if kind in IN_8_BITS:
        in_8_bits = getattr(import_module("bitsandbytes.optim"), IN_8_BITS[kind])
        optimizer: torch.optim.Optimizer = in_8_bits(
            parameters,
            lr=spec.lr,
            betas=(first, second),
            eps=constants.epsilon,
            weight_decay=decay,
        )
        return optimizer
    return torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=(first, second),
        eps=constants.epsilon,
        weight_decay=decay,
        fused=True,
    )
