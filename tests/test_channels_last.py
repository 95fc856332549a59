"""`train.channels_last`: how many of a UNet's convolutions it reaches."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.shapes import SD15, SDXL
from train.models.channels_last import keep_channels_last

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NARROW: Mapping[str, Any] = {"cross_attention_dim": 8, "sample_size": 16, "attention_head_dim": 2}
SMALL = {
    "sd15": {**SD15, **NARROW, "block_out_channels": (32, 64, 128, 128)},
    "sdxl": {
        **SDXL, **NARROW, "block_out_channels": (32, 64, 128), "transformer_layers_per_block": 1,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 8,
    },
}  # fmt: skip
"""The published UNets at a tenth of their width and with one layer in each transformer."""


def run(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, states = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 5, 8))
    )
    added = {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}
    with torch.inference_mode():
        return unet(noisy, torch.tensor([1, 900]), states, added_cond_kwargs=added).sample


@pytest.mark.parametrize(("name", "reached", "convolutions"), [("sd15", 82, 98), ("sdxl", 51, 51)])
def test_nearly_every_convolution_is_reached(name: str, reached: int, convolutions: int):
    """All but the 16 with which SD1.5's transformers end; without the hooks 4 and 9 are."""
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**SMALL[name]).eval()
    plain = run(unet)
    keep_channels_last(unet)
    seen: dict[str, bool] = {}
    for place, module in unet.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args, place=place: seen.update(
                    {place: args[0].is_contiguous(memory_format=torch.channels_last)}
                )
            )
    arranged = run(unet)
    assert (sum(seen.values()), len(seen)) == (reached, convolutions)
    assert {place.rpartition(".")[2] for place, kept in seen.items() if not kept} <= {"proj_out"}
    torch.testing.assert_close(arranged, plain, rtol=1e-3, atol=1e-4)
