"""Gradient checkpointing: what the backward pass computes again instead of remembering it.

diffusers runs its residual and transformer blocks through a function that decides. Recomputed
numbers are those of the forward pass bit for bit, for the same kernels run on the same tensors.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from train.config import Recompute

aten = torch.ops.aten

COSTLY = [
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]  # fmt: skip
"""Nearly all arithmetic of a UNet: `selective` remembers what they gave, and computes again only
norms, activations and sums, which are cheap and a third of what is remembered (Korthikanti et al.
2022 do so for language models)."""


def checkpoint_activations(unet: Any, what: Recompute) -> None:
    """Make a diffusers UNet remember less for its backward pass; the reference has none."""
    if what is not Recompute.none:
        unet.enable_gradient_checkpointing(_full if what is Recompute.full else _selective)


def _full(block: Any, *args: Any) -> Any:
    """Remember what goes into a block, and nothing within."""
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


def _selective(block: Any, *args: Any) -> Any:
    """Remember besides what the costly operations within a block gave."""
    contexts = partial(create_selective_checkpoint_contexts, COSTLY)
    return checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
