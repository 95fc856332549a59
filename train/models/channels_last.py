"""Activations in channels-last memory, which the convolutions of GPUs compute fastest in.

A convolution keeps its input's layout, so the whole UNet would keep that of its input; but each of
diffusers' transformers ends in the other layout, and is followed by most of the convolutions.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

TRANSFORMER = re.compile(r"(.+\.)?attentions\.\d+")
"""Names of a diffusers UNet's transformers over the image's positions."""


def keep_channels_last(unet: nn.Module) -> None:
    """Make a diffusers UNet compute in channels-last memory; its weights stay as they are.

    DeepSpeed takes no weights in another order. Left in the other layout is, where a transformer
    projects by convolutions (SD1.5), the one that it ends with.
    """
    unet.register_forward_pre_hook(_input_to_channels_last)
    for name, module in unet.named_modules():
        if TRANSFORMER.fullmatch(name):
            module.register_forward_hook(_output_to_channels_last)


def _input_to_channels_last(unet: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _first_to_channels_last(args)


def _output_to_channels_last(
    transformer: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]
) -> tuple[Any, ...]:
    """A transformer returns a tuple, since the UNet asks for one (`return_dict=False`)."""
    return _first_to_channels_last(output)


def _first_to_channels_last(values: tuple[Any, ...]) -> tuple[Any, ...]:
    first: Tensor = values[0]
    return (first.contiguous(memory_format=torch.channels_last), *values[1:])
