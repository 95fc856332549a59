"""The result has the optimizer's fp32 weights, whatever the model computes in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.models.adapter import ADAPTER
from tests import rank_programs
from tests.helpers_ranks import run_ranks, shared_place, straight
from tests.helpers_train import opened, write_base
from train.export.pipeline import trained_denoiser

pytestmark = pytest.mark.ranks

BF16 = "train.precision=bf16"


@pytest.mark.parametrize(("stage", "more"), [(1, ()), (2, ()), (3, ()), (2, ("tuning=lora",))])
def test_bf16_training_exports_the_fp32_masters(tmp_path: Path, stage: int, more: tuple[str, ...]):
    """On two ranks, the same as DeepSpeed's `zero_to_fp32` makes of the last checkpoint."""
    place, name = shared_place(), straight(stage, 2, BF16, *more)
    checkpoint = place.folder(name) / "step-0000006"
    run_ranks(tmp_path, 1, masters, checkpoint, stage, tmp_path / "masters.pt")
    expected = torch.load(tmp_path / "masters.pt")
    if more:
        expected = {f"unet.{k.replace('.policy.', '.')}": v for k, v in expected.items()}
        weights = load_file(place.folder(name) / "lora" / ADAPTER)
    else:
        weights = load_file(
            place.folder(name) / "pipeline/unet/diffusion_pytorch_model.safetensors"
        )
    assert weights.keys() == expected.keys()
    for key, weight in weights.items():
        assert weight.dtype is torch.float32
        assert torch.equal(weight, expected[key]), key
    rounded = [torch.equal(w, w.bfloat16().float()) for w in weights.values()]
    assert sum(rounded) < 0.2 * len(rounded)  # what the model computed with is not it


def masters(checkpoint: Path, stage: int, target: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as merge

    merged = by_hand(checkpoint) if stage == 1 else merge(str(checkpoint), tag="engine")
    torch.save({name: weight.clone() for name, weight in merged.items()}, target)


def by_hand(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed's script does not read: the ranks' parts one after the other, then cut."""
    folder = checkpoint / "engine"
    model = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    (shapes,) = model["param_shapes"]
    shards = [torch.load(p, weights_only=False) for p in sorted(folder.glob("bf16_zero_pp_rank_*"))]
    states = (shard["optimizer_state_dict"] for shard in shards)
    flat = torch.cat([state["single_partition_of_fp32_groups"][0] for state in states])
    sizes = [shape.numel() for shape in shapes.values()]
    parts = flat[: sum(sizes)].split(sizes)
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def test_stage_0_in_bf16_exports_its_masters_too(tmp_path: Path):
    run_ranks(tmp_path, 1, rank_programs.weights_are_masters, shared_place().root / "base")


def test_loads_in_diffusers_with_these_weights(tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    place = shared_place()
    folder = place.folder(straight(3, 2, BF16)) / "pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    written = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    for key, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weight, written[key]), key
    half = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.unet.dtype is torch.bfloat16


def test_a_unet_is_made_of_the_given_weights_alone(tmp_path: Path):
    """No tensor is left without numbers, and none is copied."""
    base = write_base(tmp_path)
    given = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    state = trained_denoiser(opened(base), given).state_dict()
    assert {k: v.data_ptr() for k, v in state.items()} == {
        k: v.data_ptr() for k, v in given.items()
    }
