"""Operations are counted from shapes, on a model without weights."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import shapes
from benchmarks.activations import MODELS, TrainedModel, empty_condition
from conf.job import composed
from data.families import sd1, sdxl
from data.models.family import Condition, ModelConfig
from train.models import flops

ROOT = Path(__file__).parent.parent
FLOW = {
    "sd35_medium": "SD3.5 medium at 1024",
    "flux_dev_lora": "FLUX.1 dev at 1024, LoRA of rank 32",
    "z_image_lora": "Z-Image at 1024, LoRA of rank 32",
    "sana_lora": "Sana 1.6B at 1024, LoRA of rank 128",
    "qwen_image_lora": "Qwen-Image at 1024, LoRA of rank 32",
}
"""Experiment with a flow model -> its model in the table of activations."""
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
"""The VAE of SD1.x, SD2.x and SDXL."""
SD15 = 803_273_441_280
"""Operations of SD1.5's UNet on a 64 x 64 latent with 77 tokens: 401.6 G multiply-adds."""


def test_a_forward_pass_of_sd15_has_its_operations():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shapes.SD15)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    condition = Condition(torch.zeros(2, 77, 768))
    assert flops.forward_flops(unet, sd1.FAMILY, (4, 64, 64), condition) == SD15


@pytest.mark.parametrize(
    ("uses", "frozen", "passes"),
    [(True, False, 8), (False, False, 6), (True, True, 6), (False, True, 4)],
)
def test_a_pair_is_two_images_through_policy_and_reference(uses: bool, frozen: bool, passes: int):
    assert flops.pair_flops(10, uses_reference=uses, frozen_base=frozen) == 10 * passes


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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "tera"), [("SD1.5", 64, 82.8), ("SDXL", 128, 686.6)])
def test_the_guide_has_the_cost_of_a_generated_image(name: str, side: int, tera: float):
    """Two forward passes in each of 50 steps, and the VAE's decoder."""
    unet, states, added = (
        (shapes.SD15, 768, None)
        if name == "SD1.5"
        else (
            shapes.SDXL,
            2048,
            {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)},
        )
    )
    with torch.device("meta"):
        model, vae = UNet2DConditionModel(**unet), AutoencoderKL(**VAE)
        latent = torch.empty(1, 4, side, side)
    condition = Condition(torch.zeros(1, 77, states), added)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(latent)
    family = sd1.FAMILY if added is None else sdxl.FAMILY
    count = 100 * flops.forward_flops(model, family, (4, side, side), condition)
    assert (count + counter.get_total_flops()) / 1e12 == pytest.approx(tera, abs=0.05)
    guide = (Path(__file__).parent.parent / "docs" / "own-pairs.md").read_text()
    assert f"{tera} TFLOP" in guide
    assert f"{80_000 * tera / 1e6:.2g} EFLOP" in guide  # 20 000 prompts of four images


# --- the flow experiments ------------------------------------------------------------------------


def forward_of(model: TrainedModel, **changed: int) -> int:
    """Operations of a forward pass of a transformer's published shape, or a changed one."""
    with torch.device("meta"):
        kind = getattr(diffusers, model.family.parts["transformer"])
        transformer = kind(**model.config, **changed)
        condition = empty_condition(transformer.config, 1, model.tokens, torch.float32)
    files = ModelConfig(index={}, denoiser=transformer.config, vae={}, scheduler={})
    shape = (model.family.latent_channels(files), model.side, model.side)
    return flops.forward_flops(transformer, model.family, shape, condition)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOW)
def test_experiments_say_what_their_training_costs(name: str):
    """EFLOP of all steps, and hours on 8 H100 at 25 % of their peak: in header and guide."""
    experiment = composed([f"experiment={name}", "pairs.root=/x"])
    model = MODELS[FLOW[name]]
    if name == "qwen_image_lora":  # whose blocks are alike, and take seconds to count
        one, two = (forward_of(model, num_layers=layers) for layers in (1, 2))
        forward = one + 59 * (two - one)
    else:
        forward = forward_of(model)
    train = experiment.train
    a_pair = flops.pair_flops(forward, uses_reference=True, frozen_base=train.lora.rank > 0)
    total = train.steps * train.batch * a_pair
    hours = total / (8 * flops.PEAK["H100"] * 0.25) / 3600
    cost = f"{total / 1e18:.0f} EFLOP", f"{hours:.1f} hours"
    header = (ROOT / f"conf/experiment/{name}.yaml").read_text()
    assert all(part in header for part in cost), cost
    guide = (ROOT / "docs/models.md").read_text()
    (row,) = [
        line for line in guide.splitlines() if line.startswith(f"| `{name}`") and "EFLOP" in line
    ]
    assert all(part in row for part in cost), cost
