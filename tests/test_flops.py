"""Operations are counted from shapes, on a model without weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from data.families.sd1 import FAMILY
from data.models.family import Condition
from train.models import flops

SD15 = 803_273_441_280
"""Operations of SD1.5's UNet on a 64 x 64 latent with 77 tokens: 401.6 G multiply-adds."""


def test_a_forward_pass_of_sd15_has_its_operations():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
            attention_head_dim=8,
        )  # fmt: skip
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    condition = Condition(torch.zeros(2, 77, 768))
    assert flops.forward_flops(unet, FAMILY, (4, 64, 64), condition) == SD15


@pytest.mark.parametrize(("uses", "passes"), [(True, 8), (False, 6)])
def test_a_pair_is_two_images_through_policy_and_reference(uses: bool, passes: int):
    assert flops.pair_flops(10, uses_reference=uses) == 10 * passes


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Something new", None),
    ],
)
def test_peaks_go_by_the_gpus_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak_flops(torch.device("cuda", 0)) == peak
    assert flops.peak_flops(torch.device("cpu")) is None
