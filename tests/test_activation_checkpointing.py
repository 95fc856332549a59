"""Gradient checkpointing: fewer activations, the same gradients, and what is run again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.activations import (
    COUNTED,
    MODELS,
    Alive,
    TrainedModel,
    a_pair,
    bytes_kept,
    empty_condition,
)
from benchmarks.shapes import MINIATURE, SHAPES
from data.families import flux, sd1, sd3
from train.config import ActivationCheckpointing, TrainSpec
from train.models.activation_checkpointing import checkpoint_activations

pytestmark = pytest.mark.usefixtures("one_thread")

MINIATURE_MODEL = TrainedModel(family=sd1.FAMILY, config={}, side=8)
GUIDE = Path(__file__).parent.parent / "docs" / "models.md"


def unet_of(what: ActivationCheckpointing, shape: str | None = None) -> Any:
    torch.manual_seed(0)
    unet = (
        UNet2DConditionModel(**SHAPES[shape].unet)
        if shape
        else UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet")
    ).eval()
    checkpoint_activations(unet, what)
    return unet


def loss_of(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 12, unet.config.cross_attention_dim, generator=generator)
    added = None
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.randn(2, 32, generator=generator),
                 "time_ids": torch.full((2, 6), 64.0)}  # fmt: skip
    time = torch.tensor([10, 900])
    return unet(noisy, time, states, added_cond_kwargs=added).sample.square().mean()


def gradients(what: ActivationCheckpointing, shape: str | None) -> dict[str, torch.Tensor]:
    unet = unet_of(what, shape)
    loss_of(unet).backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("shape", [None, "quick_xl"])
def test_gradients_are_the_same_bit_for_bit(shape: str | None):
    plain = gradients(ActivationCheckpointing.none, shape)
    assert any(bool(gradient.any()) for gradient in plain.values())
    for what in (ActivationCheckpointing.selective, ActivationCheckpointing.full):
        again = gradients(what, shape)
        assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items()), what


def test_less_is_remembered_the_more_is_run_again():
    """`selective` runs no product, convolution or attention again; `full` nearly all of them."""
    kept, operations = [], []
    for what in ActivationCheckpointing:
        unet = unet_of(what)
        kept.append(bytes_kept(MINIATURE_MODEL, unet, 4, torch.float32))
        loss = loss_of(unet)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        operations.append(counter.get_total_flops())
    none, selective, full = kept
    assert full < 0.5 * none
    assert full < selective < 0.9 * none
    assert operations[1] == operations[0]
    assert 1.3 * operations[0] < operations[2] < 1.5 * operations[0]


def test_what_is_counted_is_what_a_backward_pass_needs():
    """Everything is there between the passes, and gone after the second."""
    unet, weights = unet_of(ActivationCheckpointing.none), 0
    with Alive() as alive:
        loss = loss_of(unet)
        between = alive.bytes
        loss.backward()
        del loss
        weights = sum(parameter.grad.nbytes for parameter in unet.parameters())
        after = alive.bytes - weights
    assert between > 100_000
    assert after < 0.05 * between


def test_no_other_word_is_taken():
    with pytest.raises(ValueError, match="is not a valid ActivationCheckpointing"):
        TrainSpec(gradient_checkpointing=ActivationCheckpointing("some"))


@pytest.mark.slow
def test_the_guide_has_the_counted_activations():
    rows = [line.split("|") for line in GUIDE.read_text().splitlines()]
    stated = {row[1].strip(): tuple(map(float, row[2:5])) for row in rows if len(row) == 6
              and row[1].strip() in MODELS}  # fmt: skip
    assert stated == COUNTED
    for what, value in zip(ActivationCheckpointing, COUNTED["SD1.5 at 512"], strict=True):
        assert a_pair(MODELS["SD1.5 at 512"], what) / 2**30 == pytest.approx(value, abs=0.01)


# --- transformers --------------------------------------------------------------------------------

TINY = {
    "sd3": TrainedModel(
        family=sd3.FAMILY, side=16, tokens=20,
        config={
            "sample_size": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
            "caption_projection_dim": 64, "joint_attention_dim": 48, "pooled_projection_dim": 24,
            "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
    ),
    "flux": TrainedModel(
        family=flux.FAMILY, side=16, tokens=20, lora_rank=4,
        config={
            "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "joint_attention_dim": 48, "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
    ),
}  # fmt: skip


def allocated(model: TrainedModel, denoiser: Any, images: int) -> int:
    """Bytes that the allocator gave for a forward pass and did not get back."""
    noisy = torch.randn(images, 16, model.side, model.side)
    condition = empty_condition(denoiser.config, images, model.tokens, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        predicted = model.family.predict(denoiser, noisy, torch.zeros(images), condition)
    assert predicted.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_counted_activations_are_allocated(name: str):
    """Without data as counted, with data as the allocator of a real forward pass says."""
    model, counted = TINY[name], []
    for what in ActivationCheckpointing:
        denoiser = model.denoiser(what)
        real = allocated(model, denoiser, 4) - allocated(model, denoiser, 2)
        counted.append(a_pair(model, what, torch.float32))
        assert counted[-1] == pytest.approx(real, rel=0.01), what
    none, selective, full = counted
    assert full < 0.5 * none
    assert (selective < 0.9 * none) == (not model.lora_rank)  # it keeps what frozen layers drop
