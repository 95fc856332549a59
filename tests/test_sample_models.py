"""Every model family that can be trained can be sampled, and LoRA weights on their base."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data.devices import Dtype
from data.images import Size
from generate.config import Scheduler
from generate.image_files import Model, SamplesError, adapter_at, model_at
from generate.run import base_model
from generate.sampler import ImageGenerator
from tests.helpers_train import SIDE, opened, write_base, write_sdxl_base
from tests.test_conf import job
from tests.test_lora import load as load_unet
from tests.test_lora import train_a_little, trained
from train.config import LoraSpec
from train.export.pipeline import export_adapter, export_pipeline, merged_denoiser
from train.models.lora import attach, in_diffusers_format

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a red cat", "a dog", "moon")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "sd_v": write_base(root / "sd_v", "v_prediction"),
        "sdxl": write_sdxl_base(root / "sdxl"),
    }


def load(model: Model, scheduler: Scheduler = Scheduler.ddim) -> ImageGenerator:
    return ImageGenerator.load(
        model, torch.device("cpu"), scheduler=scheduler, dtype=Dtype.fp32, size=Size(SIDE, SIDE),
        steps=2, guidance=3.0,
    )  # fmt: skip


def write_adapter(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write what training with LoRA writes: the adapter, and the pipeline with it merged."""
    unet, spec = load_unet(base), LoraSpec(rank=2, alpha=4.0)
    attach(unet, spec, seed=0, with_reference=False)
    train_a_little(unet)
    adapter = in_diffusers_format(trained(unet), spec.scale, "unet")
    model = opened(base)
    export_adapter(model, adapter, folder / "lora", {"step": 1}, "a card")
    merged = merged_denoiser(model, adapter)
    export_pipeline(model, merged, folder / "pipeline", {"step": 1}, "a card")
    return adapter


@pytest.mark.parametrize("name", ["sd_v", "sdxl"])
def test_images_do_not_depend_on_the_batch(bases: dict[str, Path], name: str):
    generator = load(Model(name=name, path=str(bases[name])))
    whole = generator.sample(PROMPTS, [0, 1, 2])
    assert whole.shape == (3, SIDE, SIDE, 3)
    alone = np.concatenate([generator.sample([p], [s]) for s, p in enumerate(PROMPTS)])
    assert np.abs(alone.astype(int) - whole).max() <= 1
    assert np.abs(whole[0].astype(int) - whole[1]).mean() > 1


@pytest.mark.parametrize("name", ["sd_v", "sdxl"])
def test_lora_weights_sample_what_the_merged_pipeline_samples(
    bases: dict[str, Path], tmp_path: Path, name: str
):
    base = bases[name]
    write_adapter(base, tmp_path)
    own = base_model(job(f"model.path={base}"), "base")
    models = [model_at(own, "m", str(tmp_path / part)) for part in ("lora", "pipeline")]
    assert models[0].path == str(base)
    assert models[1].adapter == ""
    first, second = (load(model).sample(PROMPTS, [0, 1, 2]).astype(int) for model in models)
    assert np.abs(first - second).max() <= 1
    plain = load(Model(name="base", path=str(base))).sample(PROMPTS, [0, 1, 2])
    assert np.abs(first - plain).mean() > 1


def test_lora_weights_are_a_folder_or_a_file(bases: dict[str, Path], tmp_path: Path):
    write_adapter(bases["sd_v"], tmp_path)
    file = tmp_path / "lora/pytorch_lora_weights.safetensors"
    assert adapter_at(str(tmp_path / "lora")) == adapter_at(str(file)) == file
    assert adapter_at(str(tmp_path / "pipeline")) is None
    assert adapter_at("owner/name") is None
    base = Model(name="m", path=str(bases["sd_v"]))
    model = Model(name="m", path=str(bases["sd_v"]), adapter=str(file))
    before = model.fingerprint()
    assert before != base.fingerprint()
    save_file({"unet.x": torch.zeros(1)}, file)
    assert model.fingerprint() != before


def test_lora_weights_of_another_model_are_refused(bases: dict[str, Path], tmp_path: Path):
    write_adapter(bases["sd_v"], tmp_path)
    adapter = str(tmp_path / "lora/pytorch_lora_weights.safetensors")
    with pytest.raises(SamplesError, match="'m': the LoRA weights .* cannot be loaded on"):
        load(Model(name="m", path=str(bases["sdxl"]), adapter=adapter))
    file = tmp_path / "other.safetensors"
    matrix, names = torch.zeros(2, 2), ("A", "B")
    save_file({f"transformer.a.lora_{name}.weight": matrix.clone() for name in names}, file)
    with pytest.raises(SamplesError, match="has no LoRA weights for the denoiser"):
        load(Model(name="m", path=str(bases["sd_v"]), adapter=str(file)))
