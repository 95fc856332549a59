"""An adapter that a training starts from, `train.lora.start`: in diffusers' format or kohya's.

diffusers translates the names. The file is taken whole or not at all: what is left over, missing or
of another shape than the model's layers is refused by name, before a weight of the model is loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from data.models.adapter import down_matrices
from data.models.fit import misfit
from data.models.safetensors_header import read_header, some
from train.config import LoraSpec
from train.identity import checked_start
from train.models.base_model import BaseModel
from train.models.components import empty_denoiser
from train.models.lora import POLICY, REFERENCE, attach, belongs

MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
ALPHA = re.compile(r"(\.lora_A\.weight)?\.alpha$")
"""What diffusers adds to a layer's name where it gives its alpha."""
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
"""Settings in a file's metadata that make of it another adapter than is trained here."""


class StartError(ValueError):
    """A file is no adapter that this training can start from; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartAdapter:
    """The adapter of a file."""

    rank: int
    alpha: float
    matrices: Mapping[str, Tensor]
    """`<layer>.lora_A.weight` and `<layer>.lora_B.weight`, by the denoiser's names of the layers;
    the adapter is alpha / rank B A."""

    @property
    def layers(self) -> set[str]:
        """The layers that it changes."""
        return {name.partition(".lora_")[0] for name in self.matrices}


def follow_start(spec: LoraSpec, base: BaseModel) -> LoraSpec:
    """The settings, with the rank, alpha and layers of the file to start from, if there is one.

    Raises:
        ValueError: The file cannot be used, or the settings contradict it; names both.
    """
    if spec.start is None:
        return spec
    start, what = read_start(base, spec), f"train.lora.start={spec.start}"
    followed = replace(
        spec, rank=start.rank, alpha=start.alpha, targets=spec.targets or sorted(start.layers)
    )
    for name in ("rank", "alpha"):
        setting, value = getattr(spec, name), getattr(followed, name)
        if setting not in (None, value):
            raise StartError(
                f"{what} has {name} {value:g}, but train.lora.{name}={setting:g}; set that to "
                f"{value:g}, or to null to follow the file"
            )
    _check_layers(what, base, followed, start)
    return followed


def read_start(base: BaseModel, spec: LoraSpec) -> StartAdapter:
    """Read the file to start from, with its layers named as in the denoiser.

    Raises:
        ValueError: The file is damaged, or is no adapter of the denoiser alone.
    """
    path, what = checked_start(str(spec.start)), f"train.lora.start={spec.start}"
    tensors, alphas, metadata = _translated(what, path, base)
    prefix = f"{base.family.denoiser}."
    if others := sorted(name for name in tensors if not name.startswith(prefix)):
        raise StartError(
            f"{what} has weights for other parts than the {base.family.denoiser}, such as "
            f"{some(others)}; only the {base.family.denoiser} is trained, so merge them into a "
            "model first (pipeline.fuse_lora), and start from that model (model.path)"
        )
    matrices = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if unknown := sorted(name for name in matrices if not MATRIX.fullmatch(name)):
        raise StartError(
            f"{what} has {some(unknown)}, which are no matrices of a LoRA; DoRA and trained biases "
            "are not continued"
        )
    in_file, layers = len(down_matrices(read_header(path, zeros=True))), len(matrices) // 2
    if layers != in_file:
        raise StartError(
            f"{what} has {in_file} layers, of which diffusers reads {layers}; convert the file to "
            "diffusers' format (save_lora_weights) with the program that wrote it"
        )
    ranks = {float(len(tensor)) for name, tensor in matrices.items() if ".lora_A." in name}
    rank = int(_single(what, "rank", ranks))
    alpha = _alpha(what, rank, {n.partition(".lora_")[0] for n in matrices}, alphas, metadata)
    return StartAdapter(rank=rank, alpha=alpha, matrices=matrices)


def load_start(denoiser: nn.Module, start: StartAdapter) -> None:
    """Set a denoiser's adapters to the file's; policy and reference begin alike."""
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            for adapter in (POLICY, REFERENCE):
                if belongs(name, adapter):
                    parameter.copy_(start.matrices[name.replace(f".{adapter}.", ".")])


def _translated(
    what: str, path: Path, base: BaseModel
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Any]]:
    """The file's tensors by peft's names, the alphas by layer, and diffusers' own metadata."""
    unet = SimpleNamespace(layers_per_block=base.config.denoiser.get("layers_per_block", 2))
    try:
        tensors, *alphas, metadata = getattr(diffusers, base.family.pipeline).lora_state_dict(
            path.parent,
            weight_name=path.name,
            use_safetensors=True,
            local_files_only=True,
            unet_config=unet,  # the original names of SDXL's layers count through blocks
            return_alphas=True,
            return_lora_metadata=True,
        )
    except Exception as error:  # diffusers meets wrong names in many ways
        raise StartError(
            f"{what} cannot be read as LoRA of a {base.family.pipeline}: {error}"
        ) from error
    prefix = f"{base.family.denoiser}."
    by_layer = convert_unet_state_dict_to_peft((alphas or [{}])[0] or {})
    each = {ALPHA.sub("", name).removeprefix(prefix): a for name, a in by_layer.items()}
    return convert_unet_state_dict_to_peft(tensors), each, metadata or {}


def _alpha(
    what: str, rank: int, layers: set[str], alphas: Mapping[str, float], metadata: Mapping[str, Any]
) -> float:
    """The alpha that all layers share; the rank where the file gives none."""
    settings = {name.partition(".")[2]: value for name, value in metadata.items()}
    if other := [name for name in OTHER_KINDS if settings.get(name)]:
        raise StartError(f"{what} says {other[0]}={settings[other[0]]}, which is not continued")
    usual = settings.get("lora_alpha", rank)
    return _single(what, "alpha", {float(alphas.get(layer, usual)) for layer in layers})


def _single(what: str, name: str, values: set[float]) -> float:
    if len(values) != 1:
        each = ", ".join(f"{value:g}" for value in sorted(values))
        raise StartError(
            f"{what} has layers of {name} {each}; a training has one {name} for all its layers"
        )
    return next(iter(values))


def _check_layers(what: str, base: BaseModel, spec: LoraSpec, start: StartAdapter) -> None:
    """Compare layers and shapes with those that would be trained, on the meta device."""
    denoiser = empty_denoiser(base)
    in_model = {name for name, _ in denoiser.named_modules()}
    if strange := sorted(start.layers - in_model):
        raise StartError(
            f"{what} has weights for {some(strange)}, which {base.folder} has not; give the base "
            "that it was made for (model.path)"
        )
    attach(denoiser, spec, seed=0, with_reference=False)
    wanted = {
        name.replace(f".{POLICY}.", "."): parameter
        for name, parameter in denoiser.named_parameters()
        if belongs(name, POLICY)
    }
    if problem := misfit(start.matrices, wanted):
        raise StartError(
            f"{what} {problem}. What is trained is decided by train.lora.targets, which null lets "
            "follow the file, and by model.path"
        )
