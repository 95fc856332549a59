"""Writes the result in diffusers' formats: a pipeline folder, and for LoRA the adapter beside it.

Each folder is written under another name and renamed, so it is complete or absent.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.artifacts.atomic import fsync, remove, write_bytes, write_json
from data.models.adapter import ADAPTER
from data.models.folder import weight_file
from data.models.forward_process import CONFIG as SCHEDULER
from data.models.safetensors_header import read_header
from train.export.kohya import in_kohya_format
from train.models.base_model import OTHER_PARTS, BaseModel
from train.models.components import empty_denoiser
from train.models.lora import merge

ABOUT = "balanceddpo.json"
"""Where a result's weights come from. If the pipeline has this file, the run is finished."""

KOHYA = "pytorch_lora_weights_kohya.safetensors"
"""An adapter's weights in the format of kohya's scripts."""


def export_pipeline(
    base: BaseModel,
    denoiser: Any,
    folder: Path,
    about: Mapping[str, Any],
    card: str,
    scheduler: Mapping[str, str] | None = None,
) -> None:
    """Write the trained model as a diffusers folder; all but the denoiser is copied from the base.

    `scheduler` are settings that the base's scheduler lacks: what the user said of it, and what
    sampling needs.
    """
    with _whole(folder, about, card) as partial:
        for name in (*base.parts, *OTHER_PARTS):
            if name != base.family.denoiser and (base.folder / name).is_dir():
                shutil.copytree(base.folder / name, partial / name)
        shutil.copy2(base.folder / "model_index.json", partial / "model_index.json")
        if scheduler:
            _state(partial / SCHEDULER, scheduler)
        denoiser.save_pretrained(partial / base.family.denoiser)


def _state(config: Path, settings: Mapping[str, str]) -> None:
    """Write settings into a scheduler's file: whoever loads it would assume others."""
    write_json(config, json.loads(config.read_text()) | dict(settings))


def export_adapter(
    base: BaseModel,
    adapter: Mapping[str, Tensor],
    folder: Path,
    about: Mapping[str, Any],
    card: str,
) -> None:
    """Write an adapter, as `in_diffusers_format` gives it, as a folder for `load_lora_weights`.

    Other programs read that of a transformer as it is; that of a UNet is written in kohya's format,
    too.
    """
    with _whole(folder, about, card) as partial:
        save_file(dict(adapter), partial / ADAPTER, {"format": "pt"})
        if base.family.denoiser == "unet":
            tensors, metadata = in_kohya_format(adapter, base.config.denoiser)
            save_file(tensors, partial / KOHYA, metadata)


def trained_denoiser(base: BaseModel, weights: Mapping[str, Tensor]) -> Any:
    """The base's denoiser with all its weights replaced by these, in their format.

    The base's weights are not loaded: SDXL's UNet in fp32 would take another 10 GB of memory. Only
    what is saved with them but not trained is: the grid of positions of SD3.
    """
    denoiser = empty_denoiser(base)
    constants = denoiser.state_dict().keys() - weights.keys()
    denoiser.load_state_dict(dict(weights) | _read(base, constants), assign=True)
    return denoiser


def _read(base: BaseModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of the base's denoiser, in fp32."""
    part = base.folder / base.family.denoiser
    header = read_header(weight_file(part, "diffusers", str(base.folder)), zeros=True)
    tensors = {}
    for name in names:
        with safe_open(header[name].file, framework="pt") as file:
            tensors[name] = file.get_tensor(name).float()
    return tensors


def merged_denoiser(base: BaseModel, adapter: Mapping[str, Tensor]) -> Any:
    """The base's denoiser with an adapter added to its weights.

    In float32, because half precision would round small changes of a weight away.
    """
    family = base.family
    denoiser = getattr(diffusers, family.parts[family.denoiser]).from_pretrained(
        base.folder, subfolder=family.denoiser, torch_dtype=torch.float32, use_safetensors=True
    )
    merge(denoiser, adapter)
    return denoiser


@contextmanager
def _whole(folder: Path, about: Mapping[str, Any], card: str) -> Iterator[Path]:
    """Yield a folder to fill, which is renamed to `folder` when all its files are on disk."""
    partial = folder.with_name(f".{folder.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    yield partial
    write_bytes(partial / "README.md", card.encode())
    write_json(partial / ABOUT, about)
    for path in partial.rglob("*"):
        fsync(path)
    remove(folder)
    partial.rename(folder)
    fsync(folder.parent)
