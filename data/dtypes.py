"""Number formats of weights and activations."""

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Dtype(Enum):
    """Number formats of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> "torch.dtype":
        """The format as torch names it; torch is imported here, so that settings stay light."""
        import torch

        return {
            Dtype.fp32: torch.float32,
            Dtype.bf16: torch.bfloat16,
            Dtype.fp16: torch.float16,
        }[self]
