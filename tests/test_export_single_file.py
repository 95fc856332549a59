"""Models in one file: the result written as one, and one read as the base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from conf.job import with_model_folder
from data.storage.single_file import folder_of
from tests.helpers_flow import write_sd3
from tests.helpers_ranks import shared_place, straight
from tests.helpers_train import opened, text_config, write_base, write_sdxl_base
from tests.test_conf import job
from train.export.ldm_names import vae_name
from train.export.single_file import check_single_file, export_single_file

Weights = dict[str, torch.Tensor]


def write_sd2(folder: Path) -> Path:
    """OpenCLIP's text encoder, whose file has other names."""
    from transformers import CLIPTextModel

    write_base(folder)
    CLIPTextModel(text_config(hidden_act="gelu")).save_pretrained(folder / "text_encoder")
    return folder


WRITERS = {"sd1": write_base, "sd2": write_sd2, "sdxl": write_sdxl_base}
FIRST = {
    "sd1": "cond_stage_model.transformer.text_model.",
    "sd2": "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
    "sdxl": "conditioner.embedders.1.model.text_projection",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of each kind, and its single file beside it."""
    root = tmp_path_factory.mktemp("models")
    for name, write in WRITERS.items():
        base = opened(write(root / name))
        check_single_file(base)
        unet = DiffusionPipeline.from_pretrained(base.folder).unet
        export_single_file(base, unet, root / f"{name}.safetensors")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "balanceddpo" / "models"


def parts(folder: Path) -> dict[str, Any]:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    modules = pipeline.components.items()
    return {name: part for name, part in modules if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_read_back_has_the_same_tensors(root: Path, cache: Path, name: str):
    names = load_file(root / f"{name}.safetensors").keys()
    assert any(one.startswith(FIRST[name]) for one in names)
    folder = folder_of(str(root / f"{name}.safetensors"), str(root / name))
    assert folder.parent == cache
    assert folder.name.startswith(f"{name}-")
    before, after = parts(root / name), parts(folder)
    assert before.keys() == after.keys() >= {"unet", "vae", "text_encoder"}
    for part, module in before.items():
        state = after[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    stamp = (folder / "model_index.json").stat().st_mtime_ns
    assert folder_of(str(root / f"{name}.safetensors"), str(root / name)) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == stamp  # converted once


def test_the_published_vaes_names_are_those_that_diffusers_reads():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        )  # fmt: skip
    own = vae.state_dict()
    original = {f"first_stage_model.{vae_name(name, 4)}": tensor for name, tensor in own.items()}
    back = convert_ldm_vae_checkpoint(original, vae.config)
    assert {name: id(tensor) for name, tensor in back.items()} == {
        name: id(tensor) for name, tensor in own.items()
    }


def test_an_sdxl_that_predicts_v_says_so_in_its_file(root: Path, tmp_path: Path):
    """The configuration to read it with, that of SDXL itself, says epsilon."""
    folder = shutil.copytree(root / "sdxl", tmp_path / "v")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config | v))
    unet = DiffusionPipeline.from_pretrained(folder).unet
    export_single_file(opened(folder), unet, tmp_path / "v.safetensors")
    back = folder_of(str(tmp_path / "v.safetensors"), str(root / "sdxl"))
    read = json.loads((back / "scheduler" / "scheduler_config.json").read_text())
    assert v.items() <= read.items()


def test_a_file_in_half_precision_stays_so(root: Path, tmp_path: Path):
    weights = load_file(root / "sd1.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "h.safetensors")
    folder = folder_of(str(tmp_path / "h.safetensors"), str(root / "sd1"))
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}


def without(weights: Weights) -> Weights:
    return {n: t for n, t in weights.items() if n != "model.diffusion_model.out.2.weight"}


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (without, "sd1", "cannot be converted to a StableDiffusionPipeline as .* describes it"),
        (lambda w: w | {"model.diffusion_model.more.weight": torch.ones(2)}, "sd1",
         "its UNet has .* tensors, of which .* were read"),
        (lambda w: {n: t for n, t in w.items() if not n.startswith("first_stage")}, "sd1",
         "cannot be converted to a Stable"),
        (lambda w: {n: t for n, t in w.items() if not n.startswith("cond_stage")}, "sd1",
         "cannot be converted to a Stable"),
        (dict, "sdxl", "cannot be converted to a StableDiffusionXLPipeline"),
        (dict, "", r"model\.config=\(empty\) is no diffusers folder; .*model=sd15"),
        (dict, "nowhere", r"model\.config=.*nowhere is no diffusers folder"),
    ],
    ids=["missing", "more", "no vae", "no text", "other", "no config", "no folder"],
)  # fmt: skip
def test_a_file_that_is_no_such_model_is_refused(
    root: Path,
    cache: Path,
    tmp_path: Path,
    change: Callable[[Weights], Weights],
    config: str,
    says: str,
):
    save_file(change(load_file(root / "sd1.safetensors")), tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=says):
        folder_of(str(tmp_path / "mine.safetensors"), config and str(root / config))
    assert not list(cache.glob("[!.]*"))  # nothing is left of it


def test_other_families_have_no_single_file(root: Path, tmp_path: Path):
    base = opened(write_sd3(tmp_path / "sd3"))
    with pytest.raises(ValueError, match=r"single_file=true: .* is a StableDiffusion3Pipeline"):
        check_single_file(base)
    with pytest.raises(ValueError, match="is to be read as a StableDiffusion3Pipeline"):
        folder_of(str(root / "sd1.safetensors"), str(tmp_path / "sd3"))


def test_every_command_takes_the_folder_in_place_of_the_file(root: Path, cache: Path):
    path, config = f"model.path={root}/sd1.safetensors", f"model.config={root}/sd1"
    model = with_model_folder(job("model=sd15", path, config)).model
    assert Path(model.path).parent == cache
    assert model.revision is None


@pytest.mark.ranks
def test_a_finished_run_writes_the_file_when_it_is_wanted(tmp_path: Path):
    place, name = shared_place(), straight(2, 1)
    shutil.copytree(place.root / "runs" / name, place.root / "runs" / "in-one-file")
    place.train("in-one-file", "zero=stage2", "train.export.single_file=true")
    assert place.weights("in-one-file") == place.weights(name)
    folder = folder_of(
        str(place.folder("in-one-file") / "single_file.safetensors"), str(place.root / "base")
    )
    unet = "unet/diffusion_pytorch_model.safetensors"
    trained, back = load_file(place.folder(name) / "pipeline" / unet), load_file(folder / unet)
    assert all(torch.equal(back[key], value) for key, value in trained.items())
