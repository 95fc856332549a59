"""Number formats of weights and activations."""

from enum import Enum


class Dtype(Enum):
    """Number formats of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
