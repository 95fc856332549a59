"""Floating point operations: what a step needs, and what the device could do.

They are counted from shapes, on tensors without data. Model FLOPs utilization (MFU) is what was
needed over what the device could have done in the same time; recomputation does not count.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.models.family import Condition, Family

FORWARD, INPUT_GRADIENTS, WEIGHT_GRADIENTS = 1, 1, 1
"""Parts of a training step, in forward passes. The reference has the first alone."""

PEAK = {
    "H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10": 125e12,
    "RTX A6000": 155e12, "RTX 6000 Ada": 364e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bf16 operations a second by part of the GPU's name, from the makers' data sheets. The SXM
form where there are several: a PCIe card's MFU comes out too low."""


def peak_flops(device: torch.device) -> float | None:
    """A GPU's bf16 operations per second at most; None if they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [part for part in PEAK if part in name]
    return PEAK[max(known, key=len)] if known else None


def forward_flops(
    denoiser: Any, family: Family, latent_shape: tuple[int, int, int], condition: Condition
) -> int:
    """Operations of a denoiser's forward pass over one image, with the first condition."""
    with torch.device("meta"):
        empty: nn.Module = type(denoiser).from_config(denoiser.config).eval()
        noisy, timestep = torch.empty(1, *latent_shape), torch.zeros(1)
    added = condition.added and {name: _shape_of(value) for name, value in condition.added.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        first = condition.lengths and condition.lengths[:1]
        shape = Condition(_shape_of(condition.states), added, first)
        family.predict(empty, noisy, timestep, shape)
    return int(counter.get_total_flops())


def pair_flops(forward: int, *, uses_reference: bool, frozen_base: bool = False) -> int:
    """Operations of a pair in a training step: both images through policy and reference.

    With `frozen_base` (LoRA) the base's weights get no gradient; the adapter's own operations are
    left out, a few percent of the base's.
    """
    policy = FORWARD + INPUT_GRADIENTS + (0 if frozen_base else WEIGHT_GRADIENTS)
    return 2 * (policy + FORWARD * uses_reference) * forward


def _shape_of(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, *value.shape[1:], device="meta")
