"""An image that is not finite is an error: never a black PNG, a sheet, or a score."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.devices import Dtype
from data.images import Size
from data.models.forward_process import CONFIG, Prediction
from generate.config import Scheduler
from generate.image_files import Model, SamplesError, list_samples, model_at
from generate.prompts.files import Prompt
from generate.prompts.prompt_set import PromptSet
from generate.run import base_model
from generate.sampler import ImageGenerator, sample_missing
from tests.helpers_evaluate import SIDE, write_tiny_model
from tests.helpers_ranks import shared_place
from tests.test_conf import job
from tests.test_evaluate_cli import (  # noqa: F401
    Panel,
    arguments,
    folder_of,
    models,
    refused,
    world,
)
from tests.test_forward_process import edit

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["red cat", "a dog", "moon"]


def spoil_vae(folder: Path, value: float = float("nan")) -> Path:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"][:] = value
    save_file(weights, path, {"format": "pt"})
    return folder


def load(folder: Path, dtype: Dtype = Dtype.fp32) -> ImageGenerator:
    return ImageGenerator.load(
        Model(name="ours", path=str(folder)), torch.device("cpu"), scheduler=Scheduler.ddim,
        dtype=dtype, size=Size(SIDE, SIDE), steps=2, guidance=1.0,
    )  # fmt: skip


# --- generating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_model_prompt_and_seed_are_named(tmp_path: Path, value: float):
    """Infinity, too: the pipeline would clamp it to white."""
    generator = load(spoil_vae(write_tiny_model(tmp_path, 0), value))
    wanted = r"model 'ours': the image of 'red cat' \(seed 7\) .* not finite, .* are damaged"
    with pytest.raises(SamplesError, match=wanted):
        generator.sample(PROMPTS, [7, 8, 9])


@pytest.mark.parametrize("sliced", [False, True])
def test_the_image_itself_is_named(tmp_path: Path, sliced: bool):
    generator = load(write_tiny_model(tmp_path, 0))
    if sliced:
        generator.pipeline.vae.enable_slicing()
    decode, count = generator.pipeline.vae.decoder.conv_out.forward, 0

    def one_is_nan(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal count
        images = decode(hidden)
        if 0 <= 1 - count < len(images):
            images[1 - count] = torch.nan
        count += len(images)
        return images

    generator.pipeline.vae.decoder.conv_out.forward = one_is_nan
    with pytest.raises(SamplesError, match=r"'a dog' \(seed 8\)"):
        generator.sample(PROMPTS, [7, 8, 9])
    assert generator.sample(PROMPTS, [7, 8, 9]).shape == (3, SIDE, SIDE, 3)  # nothing is left over


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(Dtype.bf16, "dtype=fp32"), (Dtype.fp16, "dtype=bf16 or fp32")],
)
def test_another_dtype_is_advised(tmp_path: Path, dtype: Dtype, advice: str):
    generator = load(spoil_vae(write_tiny_model(tmp_path, 0)), dtype)
    with pytest.raises(SamplesError, match=f"may overflow: set evaluate.{advice}$"):
        generator.sample(PROMPTS, [0, 0, 0])


def test_no_file_is_written(tmp_path: Path):
    prompts = PromptSet(
        name="set",
        prompts=tuple(Prompt(i, text) for i, text in enumerate(PROMPTS)),
        empty=0,
        repeated=0,
    )
    images = list_samples(tmp_path / "samples", "ours", prompts, [0])
    with pytest.raises(SamplesError):
        sample_missing(
            load(spoil_vae(write_tiny_model(tmp_path / "m", 0))), images, 4, lambda _: None
        )
    assert not list((tmp_path / "samples").rglob("*"))


def test_nothing_is_scored(world: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any):  # noqa: F811
    folder = spoil_vae(write_tiny_model(tmp_path / "spoiled", 1))
    message = refused(
        monkeypatch, capsys, *world, f"++evaluate.models.base={world[3].partition('=')[2]}",
        f"++evaluate.models.ours={folder}",
    )  # fmt: skip
    assert re.search(r"error: model 'ours': the image of '.*' \(seed 0\) .* not finite", message)
    assert not list((folder_of(world) / "samples/ours").glob("*.png"))
    assert not (folder_of(world) / "scores.parquet").exists()
    assert Panel.loaded == 0


def test_a_process_that_ddim_cannot_sample_is_refused_before_any_image(
    world: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
):
    folder = write_tiny_model(tmp_path / "flow", 1)
    edit(folder / CONFIG, _class_name="FlowMatchEulerDiscreteScheduler")
    monkeypatch.setattr("generate.sampler.ImageGenerator.load", None)
    message = refused(
        monkeypatch, capsys, *world, f"++evaluate.models.base={world[3].partition('=')[2]}",
        f"++evaluate.models.ours={folder}",
    )  # fmt: skip
    assert f"error: model 'ours' ({folder}): scheduler/scheduler_config.json names" in message


def test_a_model_is_sampled_by_what_model_prediction_type_says(tmp_path: Path):
    """It belongs to model.path, under whatever name, and not to other models."""
    base = write_tiny_model(tmp_path / "base", 0)
    stated = base_model(job(f"model.path={base}", "model.prediction_type=v_prediction"), "base")
    for name in ("base", "m"):
        assert model_at(stated, name, str(base)).prediction_type is Prediction.v_prediction
    assert model_at(stated, "m", str(tmp_path)).prediction_type is None
    assert (
        model_at(base_model(job(f"model.path={base}"), "base"), "m", str(base)).prediction_type
        is None
    )


# --- training ------------------------------------------------------------------------------------

SHEETS = (
    "train.steps=2", "train.samples.every=2", "train.samples.count=2", "train.samples.steps=2",
    "train.reference.every=2",
)  # fmt: skip


@pytest.mark.ranks
def test_a_sheet_that_is_not_finite_ends_the_run(tmp_path: Path):
    """On every rank, before the first step."""
    place = shared_place()
    folder = spoil_vae(Path(shutil.copytree(place.root / "base", tmp_path / "base")))
    settings = (f"model.path={folder}", "train.precision=bf16", *SHEETS)
    output = place.fail("sheet-nan", *settings, world=2)
    assert re.search(
        rf"error: model\.path={folder}, step 0: the sample of 'a \w+ cat' has values that are not "
        r"finite, and no sheet was written; bf16 may overflow: set "
        r"train\.precision=fp32, or train\.samples\.every=0",
        output,
    )
    assert not list(place.folder("sheet-nan").rglob("*.png"))


@pytest.mark.ranks
def test_a_run_says_what_the_denoiser_predicts(tmp_path: Path):
    """In its first lines and on the card; what was set is in the pipeline, too."""
    place = shared_place()
    folder = Path(shutil.copytree(place.root / "base", tmp_path / "base"))
    edit(folder / CONFIG, "prediction_type")
    assumed = place.train("assumed", f"model.path={folder}", *SHEETS)
    line = "epsilon (assumed: scheduler/scheduler_config.json has no prediction_type; if it is "
    assert f"model: {line}" in assumed
    card = (place.folder("assumed") / "pipeline/README.md").read_text()
    assert f"| forward process | {line}" in card

    settings = ("model.prediction_type=v_prediction", f"model.path={folder}", *SHEETS)
    assert "model: v_prediction, 1000 timesteps, scaled_linear" in place.train("v", *settings)
    pipeline = place.folder("v") / "pipeline"
    assert (
        "| forward process | v_prediction, 1000 timesteps" in (pipeline / "README.md").read_text()
    )
    assert json.loads((pipeline / CONFIG).read_text())["prediction_type"] == "v_prediction"
    assert place.weights("v") != place.weights("assumed")
    other = place.fail("v", f"model.path={folder}", *SHEETS)
    assert "prediction_type" in other
    assert "made with other settings" in other


@pytest.mark.ranks
def test_a_model_without_signal_at_the_end_is_trained(tmp_path: Path):
    place = shared_place()
    folder = Path(shutil.copytree(place.root / "base", tmp_path / "base"))
    edit(folder / CONFIG, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    refusal = place.fail("zero-epsilon", f"model.path={folder}", *SHEETS)
    assert f"error: model.path={folder}: scheduler/scheduler_config.json has rescale_" in refusal
    assert not place.folder("zero-epsilon").exists()
    edit(folder / CONFIG, prediction_type="v_prediction")
    output = place.train("zero-v", f"model.path={folder}", *SHEETS)
    assert "rescaled to no signal at the end" in output
    assert len(list((place.folder("zero-v") / "samples").glob("*.png"))) == 2
