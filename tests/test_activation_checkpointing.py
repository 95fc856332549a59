"""Gradient checkpointing: fewer activations, the same gradients, and what is run again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.activations import COUNTED, MODELS, Alive, a_pair, bytes_kept
from benchmarks.shapes import MINIATURE, SHAPES
from train.config import ActivationCheckpointing, TrainSpec
from train.models.activation_checkpointing import checkpoint_activations

pytestmark = pytest.mark.usefixtures("one_thread")

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
        kept.append(bytes_kept(unet, 4, torch.float32))
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
