"""Writes the result in diffusers' formats: a pipeline folder, and for LoRA the adapter beside it.

Each folder is written under another name and renamed, so it is complete or absent.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from data.artifacts.atomic import fsync, remove, write_bytes, write_json
from data.models.forward_process import CONFIG as SCHEDULER
from train.models.families import OTHER_PARTS, PARTS, Family
from train.models.lora import merge

ABOUT = "balanceddpo.json"
"""Where a result's weights come from. If the pipeline has this file, the run is finished."""

ADAPTER = "pytorch_lora_weights.safetensors"
"""The name that diffusers' `load_lora_weights` looks for in a folder."""

COPIED = (
    *(name for name in PARTS[Family.sdxl] if name != "unet"),
    *OTHER_PARTS,
    "model_index.json",
)


def export_pipeline(
    base: Path,
    unet: UNet2DConditionModel,
    folder: Path,
    about: Mapping[str, Any],
    card: str,
    scheduler: Mapping[str, str] | None = None,
) -> None:
    """Write the trained model as a diffusers folder; all but the UNet is copied from the base.

    `scheduler` are settings that the base's scheduler lacks: what the user said of it, and what
    sampling needs.
    """
    with _whole(folder, about, card) as partial:
        for name in COPIED:
            if (base / name).is_dir():
                shutil.copytree(base / name, partial / name)
            elif (base / name).is_file():
                shutil.copy2(base / name, partial / name)
        if scheduler:
            _state(partial / SCHEDULER, scheduler)
        unet.save_pretrained(partial / "unet")


def _state(config: Path, settings: Mapping[str, str]) -> None:
    """Write settings into a scheduler's file: whoever loads it would assume others."""
    write_json(config, json.loads(config.read_text()) | dict(settings))


def export_adapter(
    adapter: Mapping[str, Tensor], folder: Path, about: Mapping[str, Any], card: str
) -> None:
    """Write an adapter, as `in_diffusers_format` gives it, as a folder for `load_lora_weights`."""
    with _whole(folder, about, card) as partial:
        save_file(dict(adapter), partial / ADAPTER, {"format": "pt"})


def trained_unet(base: Path, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """The base's UNet with all its weights replaced by these, in their format.

    The base's weights are not loaded: SDXL's UNet in fp32 would take another 10 GB of memory.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(base, subfolder="unet")
        )
    unet.load_state_dict(dict(weights), assign=True)
    return unet


def merged_unet(base: Path, adapter: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """The base's UNet with an adapter added to its weights.

    In float32, because half precision would round small changes of a weight away.
    """
    unet = UNet2DConditionModel.from_pretrained(
        base, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True
    )
    merge(unet, adapter)
    return unet


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
