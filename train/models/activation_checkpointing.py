"""Activation (gradient) checkpointing: activations that the backward pass recomputes.

diffusers runs its residual and transformer blocks through a function, which is set here. Recomputed
numbers equal those of the forward pass bit for bit: the same kernels run on the same tensors.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from train.config import ActivationCheckpointing

aten = torch.ops.aten

COSTLY = [
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]  # fmt: skip
"""Nearly all arithmetic of a UNet or a transformer: `selective` keeps their results and recomputes
only norms, activation functions and sums, which are cheap and a third of the memory (Korthikanti et
al. 2022 do so for language models)."""


def checkpoint_activations(denoiser: Any, kind: ActivationCheckpointing) -> None:
    """Make a denoiser of diffusers keep fewer activations for its backward pass."""
    if kind is not ActivationCheckpointing.none:
        full = kind is ActivationCheckpointing.full
        denoiser.enable_gradient_checkpointing(_full if full else _selective)


def _full(block: Any, *args: Any) -> Any:
    """Keep a block's inputs, and nothing within."""
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


def _selective(block: Any, *args: Any) -> Any:
    """Keep a block's inputs, and the results of costly operations within."""
    contexts = partial(create_selective_checkpoint_contexts, COSTLY)
    return checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
