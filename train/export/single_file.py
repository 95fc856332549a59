"""The result as one file of the original Stable Diffusion code, which ComfyUI and A1111 read.

Names are checked against diffusers' own translation before the training begins: what it would not
read back is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor

from data.artifacts.atomic import publish
from data.families.sd1 import StableDiffusion
from data.models.family import ModelError
from data.models.forward_process import DiscreteProcess, Prediction
from train.export.ldm_names import open_clip_name, unet_names, vae_name
from train.models.base_model import BaseModel

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "text_model."
"""Begins the names of CLIP's text model in some versions of transformers and not in others."""

Tensors = Mapping[str, Tensor]


def check_single_file(base: BaseModel) -> None:
    """Refuse a model that cannot be written as a single file; nothing is loaded.

    Raises:
        ModelError: Says which part has no original name that diffusers reads back.
    """
    what = f"train.export.single_file=true: {base.folder}"
    if not isinstance(base.family, StableDiffusion):
        raise ModelError(
            f"{what} is a {base.family.pipeline}; single files are written of SD1.x, SD2.x and "
            "SDXL: set it to false"
        )
    with torch.device("meta"):
        unet, vae = (
            kind.from_config(kind.load_config(base.folder, subfolder=part))
            for kind, part in ((diffusers.UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
        )
    for part, model, original, translate in (
        ("unet", unet, _of_unet, convert_ldm_unet_checkpoint),
        ("vae", vae, _of_vae, convert_ldm_vae_checkpoint),
    ):
        own = model.state_dict()
        try:
            back = translate(original(own, model.config), config=model.config)
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{what} has a {part} without a place in the original code ({error})"
            ) from error
        if {name: tensor.shape for name, tensor in back.items()} != {
            name: tensor.shape for name, tensor in own.items()
        }:
            raise ModelError(f"{what} has a {part} that diffusers would not read back")


def export_single_file(base: BaseModel, denoiser: Any, path: Path) -> None:
    """Write the trained model with the base's other parts, all in fp32."""
    tensors = _of_unet(denoiser.state_dict(), denoiser.config)
    vae = AutoencoderKL.from_pretrained(base.folder, subfolder="vae", use_safetensors=True)
    tensors |= _of_vae(vae.state_dict(), vae.config)
    for number, part in enumerate(base.family.text_encoders):
        kind = getattr(transformers, base.family.parts[part])
        encoder = kind.from_pretrained(
            base.folder, subfolder=part, dtype=torch.float32, use_safetensors=True
        )
        tensors |= _of_text_encoder(base, number, encoder)
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors | _marks(base), partial, {"format": "pt"})
    publish(partial, path)


def _of_unet(tensors: Tensors, config: Any) -> dict[str, Tensor]:
    split = {name: name.rpartition(".") for name in tensors}
    layers = unet_names({layer for layer, _, _ in split.values()}, config["layers_per_block"])
    return {f"{UNET}{layers[split[n][0]]}.{split[n][2]}": t for n, t in tensors.items()}


def _of_vae(tensors: Tensors, config: Any) -> dict[str, Tensor]:
    """The attention's matrices are convolutions of 1 x 1 pixels in the original."""
    num_blocks, renamed = len(config["up_block_types"]), {}
    for name, tensor in tensors.items():
        original = vae_name(name, num_blocks)
        is_matrix = ".attn_1." in original and tensor.ndim == 2
        renamed[f"{VAE}{original}"] = tensor[:, :, None, None] if is_matrix else tensor
    return renamed


def _of_text_encoder(base: BaseModel, number: int, encoder: Any) -> dict[str, Tensor]:
    """OpenAI's CLIP keeps its names; OpenCLIP's, told by its activation function, have others."""
    tensors = {name.removeprefix(CLIP): tensor for name, tensor in encoder.state_dict().items()}
    is_xl = len(base.family.text_encoders) > 1
    prefix = f"conditioner.embedders.{number}." if is_xl else "cond_stage_model."
    if encoder.config.hidden_act == "quick_gelu":
        return {f"{prefix}transformer.{CLIP}{name}": tensor for name, tensor in tensors.items()}
    return {f"{prefix}model.{name}": tensor for name, tensor in _open_clip(tensors).items()}


def _open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix in OpenCLIP, and the projection is transposed."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"]
            layer = open_clip_name(name.partition("q_proj.")[0])
            renamed[f"{layer}in_proj_{name.rpartition('.')[2]}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            original = open_clip_name(name)
            renamed[original] = tensor.T if original == "text_projection" else tensor
    return renamed


def _marks(base: BaseModel) -> dict[str, Tensor]:
    """Empty tensors by which ComfyUI and A1111 tell an SDXL that predicts v, up to pure noise."""
    process = base.process
    assert isinstance(process, DiscreteProcess)
    if len(base.family.text_encoders) == 1 or process.prediction is Prediction.epsilon:
        return {}
    names = ("v_pred", "ztsnr") if process.zero_terminal_snr else ("v_pred",)
    return {name: torch.empty(0) for name in names}
