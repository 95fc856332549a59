"""LoRA: one UNet, two adapters, and a result that diffusers reads."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.models.adapter import ADAPTER
from tests.helpers_ranks import run_ranks, shared_place, straight
from tests.helpers_train import opened, write_base, write_sdxl_base
from tests.test_checkpoint import copy_run, same_journals
from tests.test_components import PUBLISHED as UNETS
from tests.test_components import published_unet
from train.config import LoraSpec
from train.export.pipeline import KOHYA, export_adapter, merged_denoiser
from train.models.lora import (
    POLICY,
    as_reference,
    attach,
    belongs,
    choose,
    counts,
    in_diffusers_format,
    layers,
    of_reference,
)
from train.models.memory import ADAPTERS, LINEAR, ParameterCounts

LORA = ("tuning=lora", "train.lora.rank=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def load(base: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()


def predict(unet: Any, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 12, width, generator=generator)
    return unet(noisy, torch.tensor([10, 700]), states, return_dict=False)[0]


def train_a_little(unet: Any) -> None:
    """Move the policy's adapter as a training would: B leaves 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def trained(unet: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in unet.named_parameters() if p.requires_grad}


# --- two adapters in one UNet --------------------------------------------------------------------


@pytest.mark.parametrize("moving", [True, False])
@torch.no_grad()
def test_policy_and_reference_begin_as_the_base_and_part(base: Path, moving: bool):
    unet, before = load(base), predict(load(base))
    attach(unet, LoraSpec(rank=4), seed=7, with_reference=moving)
    reference = as_reference(unet)
    assert torch.equal(predict(unet), before)
    assert torch.equal(predict(reference), before)
    train_a_little(unet)
    assert not torch.allclose(predict(unet), before)
    assert torch.equal(predict(reference), before)
    theirs = of_reference(unet)
    assert theirs.keys() == (trained(unet).keys() if moving else set())
    for name, parameter in theirs.items():
        parameter.copy_(unet.get_parameter(name))
    assert torch.equal(predict(reference), predict(unet)) == moving


def test_only_the_policys_adapter_is_trained(base: Path):
    unet = load(base)
    attach(unet, LoraSpec(rank=4), seed=7, with_reference=True)
    assert all(belongs(name, POLICY) for name in trained(unet))
    reference = as_reference(unet)
    predicted = predict(unet)
    predict(reference)  # between the policy's forward and backward pass, as in a step
    predicted.pow(2).mean().backward()
    for name, parameter in unet.named_parameters():
        assert (parameter.grad is not None) == belongs(name, POLICY), name


def test_recomputed_activations_are_the_policys(base: Path):
    """With gradient checkpointing the UNet runs again in the backward pass, after the reference."""
    gradients = []
    for checkpointing in (False, True):
        unet = load(base)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        attach(unet, LoraSpec(rank=4), seed=7, with_reference=True)
        train_a_little(unet)
        predicted = predict(unet)
        predict(as_reference(unet))
        predicted.pow(2).mean().backward()
        gradients.append({name: unet.get_parameter(name).grad for name in trained(unet)})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_an_error_in_the_reference_leaves_the_policy_chosen(base: Path):
    unet = load(base)
    attach(unet, LoraSpec(rank=4), seed=7, with_reference=True)
    with pytest.raises(TypeError):
        as_reference(unet)("no image")
    assert {tuple(layer.active_adapters) for layer in layers(unet)} == {(POLICY,)}


def test_an_adapter_is_drawn_from_its_seed_alone(base: Path):
    drawn = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        unet = load(base)
        attach(unet, LoraSpec(rank=4), seed=seed, with_reference=False)
        drawn.append(torch.cat([p.flatten() for p in trained(unet).values()]))
        assert torch.initial_seed() == noise  # nobody else's random numbers are touched
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "known", "parameters"),
    [("sd15", "SD1.5", 797_184), ("sd21", "SD2.1", 829_952), ("sdxl", "SDXL", 5_806_080)],
)
def test_adapters_of_the_published_unets_have_the_known_size(
    name: str, known: str, parameters: int
):
    """Rank 4 on the attentions' four layers: for each, rank x (inputs + outputs)."""
    unet = copy.deepcopy(published_unet(name))
    attach(unet, LoraSpec(rank=4), seed=0, with_reference=True)
    count = replace(counts(unet), factored=0)
    assert count == ParameterCounts(denoiser=UNETS[name][1], adapter=parameters)
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == parameters
    assert sum(p.numel() for p in of_reference(unet).values()) == parameters
    assert ADAPTERS[known] == 16 // 4 * parameters
    linear = (m for m in published_unet(name).modules() if isinstance(m, torch.nn.Linear))
    assert LINEAR[known] == sum(layer.weight.numel() for layer in linear)


def test_a_target_that_is_not_there_is_named(base: Path):
    with pytest.raises(ValueError, match=r"has to_w, .*allowed are .*net.2.*to_out.0, to_q"):
        attach(load(base), LoraSpec(rank=4, targets=["to_q", "to_w"]), seed=0, with_reference=False)


# --- the result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["conv1", "proj_in", "ff.net.2"]])
@torch.no_grad()
def test_merged_weights_compute_what_base_and_adapter_do(base: Path, targets: list[str]):
    spec, unet = LoraSpec(rank=4, alpha=6.0, targets=targets), load(base)
    attach(unet, spec, seed=7, with_reference=False)
    train_a_little(unet)
    merged = merged_denoiser(opened(base), in_diffusers_format(trained(unet), spec.scale, "unet"))
    torch.testing.assert_close(predict(merged), predict(unet), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(merged), predict(load(base)), atol=1e-3)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@torch.no_grad()
def test_diffusers_loads_the_adapter_with_its_scale(tmp_path: Path, family: str):
    """With `load_lora_weights`, of both files, and with merged weights: the same image."""
    from diffusers import DiffusionPipeline

    base = write_base(tmp_path / "m") if family == "sd" else write_sdxl_base(tmp_path / "m")
    unet, spec = load(base), LoraSpec(rank=4, alpha=2.0)
    attach(unet, spec, seed=7, with_reference=True)
    train_a_little(unet)
    adapter = in_diffusers_format(trained(unet), spec.scale, "unet")
    export_adapter(opened(base), adapter, tmp_path / "lora", {"step": 1}, "a card")
    pipelines = [DiffusionPipeline.from_pretrained(base) for _ in range(4)]
    pipelines[0].load_lora_weights(tmp_path / "lora")
    pipelines[1].unet = merged_denoiser(opened(base), adapter)
    pipelines[3].load_lora_weights(tmp_path / "lora", weight_name=KOHYA)
    images = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        output = pipeline("a red cat", num_inference_steps=2, height=16, width=16, latents=noise,
                        output_type="pt")  # fmt: skip
        images.append(output.images)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)
    assert (images[0] - images[2]).abs().max() > 1e-2
    torch.testing.assert_close(images[0], images[3], rtol=0, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md", "balanceddpo.json", ADAPTER, KOHYA,
    ]  # fmt: skip


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_same_bits(stage: int, world: int):
    """Margin 0 at first and after each snapshot; interrupted after step 4, the result is the same,
    and a checkpoint has the adapters alone."""
    place, name = shared_place(), straight(stage, world, *LORA)
    for line in place.journal(name):
        assert (line["margin"] == 0) == (line["step"] in (1, 4))
    again = f"again-lora-{stage}"
    folder = copy_run(place, name, again, "step-0000006", "lora")
    place.train(again, f"zero=stage{stage}", *LORA, world=world)
    assert place.weights(again) == place.weights(name)
    same_journals(place, name, again)
    adapters = [load_file(place.folder(run) / "lora" / ADAPTER) for run in (name, again)]
    assert all(torch.equal(adapters[1][key], value) for key, value in adapters[0].items())
    size = sum(path.stat().st_size for path in (folder / "step-0000004").rglob("*.pt"))
    whole = (place.root / "base/unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert size < whole  # although the optimizer's three copies of the adapter are there


@pytest.mark.ranks
def test_a_run_of_lora_goes_on_with_another_number_of_ranks():
    place, name = shared_place(), straight(2, 1, *LORA)
    copy_run(place, name, "moved-lora", "step-0000006", "lora")
    assert "written by 1 processes, now 2" in place.train("moved-lora", *LORA, world=2)
    for one, two in zip(place.journal(name), place.journal("moved-lora"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.ranks
def test_the_pipeline_is_the_base_with_the_adapter_merged(tmp_path: Path):
    place, name = shared_place(), straight(2, 1, *LORA)
    shutil.copytree(place.folder(name) / "lora", tmp_path / "lora")
    run_ranks(tmp_path, 1, draws_the_same, place.folder(name), place.root / "base")
    assert "LoRA of rank 4" in (place.folder(name) / "pipeline/README.md").read_text()


@torch.no_grad()
def draws_the_same(folder: Path, base: Path) -> None:
    from diffusers import StableDiffusionPipeline

    whole = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    parts = StableDiffusionPipeline.from_pretrained(base)
    untouched = predict(parts.unet)
    parts.load_lora_weights(folder / "lora")
    torch.testing.assert_close(predict(whole.unet), predict(parts.unet), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(whole.unet), untouched, atol=1e-4)


@pytest.mark.ranks
def test_a_wrong_target_stops_before_training():
    place = shared_place()
    output = place.fail("lost-target", *LORA, "train.lora.targets=[to_w]")
    assert "train.lora.targets has to_w, but no layer" in output
    assert "Traceback" not in output
    assert not (place.folder("lost-target") / "config.json").exists()  # put right, it may begin


def test_choosing_none_is_the_base(base: Path):
    unet = load(base)
    attach(unet, LoraSpec(rank=4), seed=7, with_reference=True)
    train_a_little(unet)
    choose(layers(unet))
    with torch.no_grad():
        assert torch.equal(predict(unet), predict(load(base)))
