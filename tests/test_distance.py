"""How far a model is from the base: each number by hand, or by the formula with other code."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from data.artifacts.atomic import write_bytes
from data.devices import Dtype
from data.images import Size, encode_png
from data.models.forward_process import Prediction
from evaluate import steps
from evaluate.config import EvaluateSpec
from evaluate.judging.denoisers import LEVELS, Inputs, Probe, squared_differences
from evaluate.judging.distance import diversity, known, unmeasured
from evaluate.judging.looks import contrast, pairwise_distance, saturation
from evaluate.judging.scores import read_pixels
from evaluate.plan import ComparisonPlan
from evaluate.reporting.distance import distance_of, distance_rows, distance_sentence
from evaluate.statistics.distance import change, denoiser_distance
from generate.config import Scheduler
from generate.image_files import Model, Sample
from generate.prompts.files import Prompt
from generate.prompts.prompt_set import PromptSet
from generate.sampler import ImageGenerator, generator
from label.metrics.preprocessing import ImageTransform, ResizeMode
from tests.helpers_evaluate import SIDE, tiny_pipeline, write_tiny_model
from tests.helpers_flow import write_flux, write_qwen_image, write_sana, write_sd3, write_z_image
from tests.helpers_train import write_sdxl_base

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
WORDS = ("red cat", "a dog", "big tree")
PROMPTS = PromptSet("set", tuple(Prompt(i, word) for i, word in enumerate(WORDS)), 0, 0)


# --- images --------------------------------------------------------------------------------------


def flat(*colour: int) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8), (4, 4, 1))


@pytest.mark.parametrize(
    ("pixels", "saturated"),
    [
        (flat(200, 0, 0), 1.0),
        (flat(90, 90, 90), 0.0),
        (flat(0, 0, 0), 0.0),
        (flat(200, 150, 100), 0.5),
        (np.concatenate([flat(200, 0, 0), flat(9, 9, 9)]), 0.5),
    ],
)
def test_saturation_by_hand(pixels: np.ndarray, saturated: float):
    assert saturation(pixels) == pytest.approx(saturated)


def test_contrast_by_hand():
    assert contrast(np.concatenate([flat(255, 255, 255), flat(0, 0, 0)])) == pytest.approx(0.5)
    assert contrast(np.concatenate([flat(0, 255, 0), flat(0, 0, 0)])) == pytest.approx(0.3576)
    assert contrast(flat(7, 8, 9)) == pytest.approx(0)


def test_pairwise_distance_by_hand():
    """Cosines 0, 1 and 0 between the three pairs."""
    rows = np.array([[1.0, 0], [0, 1], [1, 0]])
    assert pairwise_distance(rows) == pytest.approx(2 / 3)
    assert pairwise_distance(rows[[0, 2]]) == pytest.approx(0)
    assert np.isnan(pairwise_distance(rows[:1]))


def test_diversity_is_of_each_prompts_own_images(tmp_path: Path):
    """Prompt 0 has one colour twice, prompt 1 two that are orthogonal."""

    def embed_images(images: np.ndarray) -> torch.Tensor:
        rows = torch.from_numpy(images.astype(np.float32)).mean(dim=(1, 2))
        return rows / rows.norm(dim=1, keepdim=True)

    transform = ImageTransform(ResizeMode.NONE)
    backbone = SimpleNamespace(embed_images=embed_images)
    metric = SimpleNamespace(resolved=SimpleNamespace(transform=transform), backbone=backbone)
    colours = {(0, 0): (9, 0, 0), (0, 1): (90, 0, 0), (1, 0): (9, 0, 0), (1, 1): (0, 9, 0)}
    samples = [
        Sample("m", Prompt(prompt, "x"), seed, tmp_path / f"{prompt}-{seed}.png")
        for prompt, seed in colours
    ]
    for sample, colour in zip(samples, colours.values(), strict=True):
        write_bytes(sample.path, encode_png(flat(*colour)))
    for batch in (1, 3, 4):
        assert diversity(samples, metric, batch) == pytest.approx([0, 1], abs=1e-6)


# --- statistics ----------------------------------------------------------------------------------


def test_a_change_is_a_mean_over_values_with_prompts_resampled():
    base, prompt = np.array([1.0, 3, 5, 7]), np.array([0, 0, 1, 1])
    result = change(base, base + np.array([1.0, 1, 3, 3]), prompt, 0)
    assert (result["base"], result["model"], result["change"].value) == (4, 6, 2)
    assert (result["change"].low, result["change"].high) == (1, 3)  # two prompts alone


def test_levels_are_averaged_and_compared_with_the_bases_error():
    squared, error = np.array([[1.0, 3], [10, 10]]), np.array([[4.0, 4], [5, 15]])
    result = denoiser_distance(squared, error, (0.1, 0.9), 0)
    low, high = result["levels"]
    assert (low["noise"], low["squared_difference"].value, low["fraction"]) == (0.1, 2, 0.5)
    assert (high["squared_difference"].low, high["squared_difference"].high) == (10, 10)
    assert result["mean"]["squared_difference"].value == 6
    assert result["mean"]["fraction"] == pytest.approx(6 / 7)


# --- denoisers -----------------------------------------------------------------------------------


def loaded(folder: Path, name: str = "m") -> Probe:
    model = Model(name=name, path=str(folder))
    whole = ImageGenerator.load(
        model, CPU, scheduler=Scheduler.ddim, dtype=Dtype.fp32, size=Size(SIDE, SIDE), steps=2,
        guidance=1.0,
    )  # fmt: skip
    return Probe(whole, model, Scheduler.ddim)


def inputs_of(probe: Probe, folder: Path) -> Inputs:
    rng, samples = np.random.default_rng(0), []
    for prompt in PROMPTS.prompts:
        samples.append(Sample("base", prompt, 0, folder / f"{prompt.id}.png"))
        write_bytes(samples[-1].path, encode_png(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)))
    return Inputs(samples, probe.encode(samples))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_tiny_model(folder, 0),
        write_sdxl_base, write_sd3, write_flux, write_z_image, write_sana,
        write_qwen_image,
    ],
)  # fmt: skip
def test_a_denoiser_is_asked_as_in_training(write: Callable[[Path], Path], tmp_path: Path):
    """Latents, noise, timesteps and conditions of every family are those of stage two's code."""
    from train.config import ModelSpec, Precision
    from train.models.components import load_components

    folder = write(tmp_path / "model")
    probe = loaded(folder)
    inputs = inputs_of(probe, tmp_path)
    predicted = probe.predictions(inputs, 2)
    spec = ModelSpec(path=str(folder), resolution=SIDE)
    ours = load_components(spec, Precision.fp32, CPU, shift=1.0)
    pixels = torch.from_numpy(np.stack([read_pixels(sample.path) for sample in inputs.samples]))
    latents = ours.encode_images(pixels, torch.zeros(len(pixels), *ours.latent_shape(ours.square)))
    torch.testing.assert_close(inputs.latents, latents, rtol=1e-4, atol=1e-4)
    condition = ours.condition_of_new([*WORDS])
    denoiser, shape = ours.denoiser(), ours.latent_shape(ours.square)
    for index, level in enumerate(LEVELS):
        noise = torch.stack(
            [
                torch.randn(shape, generator=generator(word, 0, f"distance/{index}"))
                for word in WORDS
            ]
        )
        timestep = torch.full((3,), round(level * 999))
        noisy = ours.schedule.add_noise(latents, noise, timestep)
        with torch.no_grad():
            at = ours.schedule.denoiser_timestep(timestep)
            expected = ours.predict(denoiser, noisy, at, condition)
        torch.testing.assert_close(predicted.values[index], expected, rtol=1e-3, atol=1e-4)
        target = ours.schedule.get_target(latents, noise, timestep)
        errors = (expected - target).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(predicted.errors[index], errors, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "base", 0)


def test_a_models_distance_from_itself_is_0_and_no_batch_matters(base: Path, tmp_path: Path):
    probe = loaded(base)
    inputs = inputs_of(probe, tmp_path)
    first = probe.predictions(inputs, 3)
    assert (squared_differences(probe.predictions(inputs, 3), first) == 0).all()
    assert squared_differences(probe.predictions(inputs, 2), first).max() < 1e-10


def write_changed(folder: Path, change: Callable[[object], None]) -> Path:
    """The tiny base with a change."""
    pipeline = tiny_pipeline(0)
    with torch.no_grad():
        change(pipeline)
    pipeline.save_pretrained(folder)
    return folder


def plan_of(tmp_path: Path, models: dict[str, Path]) -> ComparisonPlan:
    spec = EvaluateSpec(steps=2, guidance=1.0, device="cpu", batch=4)
    plan = ComparisonPlan(
        folder=tmp_path / "evaluate", spec=spec, prompts=PROMPTS, judges=(), metrics={},
        models=tuple(Model(name=name, path=str(path)) for name, path in models.items()),
        size=Size(SIDE, SIDE), seed=0,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    for samples in plan.images.values():
        for sample in samples:
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            write_bytes(sample.path, encode_png(pixels))
    return plan


@pytest.fixture(scope="module")
def measured(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ComparisonPlan:
    """A base, a model that differs in what it predicts, and two that cannot be compared."""

    def shift(pipeline) -> None:
        pipeline.unet.conv_out.bias += 0.1  # every prediction changes by 0.1

    def swap_vae(pipeline) -> None:
        pipeline.vae.encoder.conv_out.bias += 3.0

    def predict_v(pipeline) -> None:
        pipeline.scheduler.register_to_config(prediction_type=Prediction.v_prediction.value)

    place = tmp_path_factory.mktemp("measured")
    models = {"base": base, "shifted": write_changed(place / "shifted", shift)}
    models["other"] = write_changed(place / "other", swap_vae)
    models["v"] = write_changed(place / "v", predict_v)
    plan = plan_of(place, models)
    assert unmeasured(plan) == ([*models], ["shifted", "other", "v"])
    steps.measure_distances(plan, {}, Console(quiet=True))
    assert unmeasured(plan) == ([], [])
    return plan


def test_the_distance_of_a_known_change(measured: ComparisonPlan):
    distance = distance_of(measured, "shifted")
    squared = distance["denoiser"]["mean"]["squared_difference"]
    assert [squared[key] for key in ("value", "low", "high")] == pytest.approx([0.01] * 3, rel=1e-4)
    assert distance["denoiser"]["predicts"] == "epsilon"
    assert distance["denoiser"]["images"] == 3
    path, settings = measured.image_facts("shifted"), measured.image_fact_settings("shifted")
    assert distance["saturation"]["model"] == pytest.approx(
        np.mean(known(path, settings)["saturation"])
    )
    assert "diversity" not in distance  # one image a prompt
    assert len(distance_rows(distance)) == 2 + len(LEVELS) + 1
    said = distance_sentence({"base": "base", "distance": distance})
    assert "predictions of epsilon differ by 0.01" in said


def test_why_denoisers_cannot_be_compared_is_said(measured: ComparisonPlan):
    reasons = {name: distance_of(measured, name)["denoiser"]["reason"] for name in ("other", "v")}
    assert reasons == {
        "other": "other and base have different VAEs",
        "v": "v and base have different forward processes or predictions",
    }
    comparison = {"base": "base", "distance": distance_of(measured, "other")}
    assert "denoisers not compared (other and base" in distance_sentence(comparison)
    assert len(distance_rows(comparison["distance"])) == 2


def test_what_is_known_is_not_measured_again(measured: ComparisonPlan, monkeypatch):
    monkeypatch.setattr(steps, "load_model", None)
    steps.measure_distances(measured, {}, Console(quiet=True))
    without = replace(measured, spec=replace(measured.spec, distance_images=0))
    assert unmeasured(without) == ([], [])
    path = measured.denoiser_facts("shifted")
    whole = path.read_text()
    record = json.loads(whole)
    others = record | {"settings": {"model": "another"}}, record | {"facts": {"levels": []}}
    for damaged in ("{", *map(json.dumps, others)):
        path.write_text(damaged)
        assert unmeasured(measured) == ([], ["shifted"])
        assert distance_of(measured, "shifted")["denoiser"] is None
    path.write_text(whole)
