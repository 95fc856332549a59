"""Which models can be aligned is told from configuration files alone; every other gets a reason."""

import json
import shutil
from pathlib import Path

import pytest

from data.families import sd1, sdxl
from data.models.family import Family
from train.config import LoraSpec, ModelSpec
from train.identity import fingerprint
from train.models.base_model import CONFIGS, WANTED, find_model, open_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_folder(folder: Path, family: Family = sd1.FAMILY, **index: object) -> Path:
    """A model's configuration and empty weights."""
    for name in sdxl.FAMILY.parts:
        (folder / name).mkdir(parents=True)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        if not name.startswith(("tokenizer", "scheduler")):
            (folder / name / f"{stem}.safetensors").write_bytes(b"")
    added = "text_time" if family is sdxl.FAMILY else None
    write(folder / "model_index.json", {"_class_name": family.pipeline} | index)
    write(folder / "unet/config.json", {"in_channels": 4, "addition_embed_type": added})
    write(folder / "vae/config.json", {"latent_channels": 4, "block_out_channels": [1, 2, 4, 4]})
    write(folder / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"})
    return folder


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("family", [sd1.FAMILY, sdxl.FAMILY], ids=lambda one: one.name)
def test_a_folder_of_each_family_is_opened(tmp_path: Path, family: Family):
    base = open_model(ModelSpec(path=str(write_folder(tmp_path / "m", family))))
    assert base.family is family
    assert base.vae_factor == 8
    assert base.vae_in_fp32 == (family is sdxl.FAMILY)


def test_sdxl_says_what_its_vae_bears(tmp_path: Path):
    folder = write_folder(tmp_path / "m", sdxl.FAMILY)
    vae = {"latent_channels": 4, "block_out_channels": [1, 2, 4, 4], "force_upcast": False}
    write(folder / "vae/config.json", vae)
    assert not open_model(ModelSpec(path=str(folder))).vae_in_fp32


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "PixArtSigmaPipeline"},
            r"is a PixArtSigmaPipeline; allowed are FluxPipeline \(flux\), QwenImagePipeline",
        ),
        ("unet/config.json", {"in_channels": 9}, "9 input channels for latents of 4: an inpaint"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type=text_time"),
        ("unet/config.json", None, "unet/config.json cannot be read"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, path: str, value: dict | None, message: str):
    folder = write_folder(tmp_path / "m")
    (folder / path).write_text("{" if value is None else json.dumps(value))
    with pytest.raises(ValueError, match=message):
        open_model(ModelSpec(path=str(folder)))


def test_a_refiner_is_refused(tmp_path: Path):
    folder = write_folder(tmp_path / "m", sdxl.FAMILY, requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="asks no aesthetics score"):
        open_model(ModelSpec(path=str(folder)))


def test_a_part_or_its_weights_missing_are_named(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ValueError, match=r"in 'unet'; pickled weights and variants .*'fp16'"):
        open_model(ModelSpec(path=str(folder)))
    shutil.rmtree(folder / "scheduler")
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="no folder 'scheduler'; a StableDiffusionPipeline needs"):
        open_model(ModelSpec(path=str(folder)))


def test_the_resolution_must_fit_the_vae(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    with pytest.raises(ValueError, match="resolution=500 is no multiple of 8"):
        open_model(ModelSpec(path=str(folder), resolution=500))


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("/nowhere", None, "is not a diffusers folder"),
        ("models/sdxl.ckpt", None, r"a pickled file, .*give a \.safetensors file"),
        ("stabilityai/sdxl", None, r"a hub id needs its 40-digit commit in model\.revision"),
        ("stabilityai/sdxl", "main", "has revision 'main'; give the 40-digit commit"),
    ],
)
def test_what_is_no_folder_is_answered(path: str, revision: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        find_model(ModelSpec(path=path, revision=revision))


def test_a_hub_id_is_fetched_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    requests: list[tuple] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **settings: str) -> str:
        requests.append((name, settings, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("data.storage.hub.unreachable", lambda: "")
    write_folder(tmp_path)
    spec = ModelSpec(path="owner/name", revision=COMMIT)
    assert find_model(spec) == tmp_path
    where = ("owner/name", {"repo_type": "model", "revision": COMMIT})
    assert requests == [(*where, CONFIGS), (*where, WANTED)]
    assert not any("bin" in pattern or "fp16" in pattern for pattern in WANTED)
    assert fingerprint(spec) == f"owner/name@{COMMIT}"  # and nothing was fetched for it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "train.lora.rank=-1"),
        ({"rank": 4, "alpha": 0.0}, "train.lora.alpha=0.0"),
        ({"rank": 4, "targets": []}, "train.lora.targets is empty"),
    ],
)
def test_settings_of_lora_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LoraSpec(**settings)
    assert LoraSpec(rank=8).scale == 1.0
    assert LoraSpec(rank=8, alpha=4.0).scale == 0.5
