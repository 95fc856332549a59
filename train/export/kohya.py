"""A UNet's adapter in the format of kohya's sd-scripts, which ComfyUI and A1111 read, too."""

from collections.abc import Mapping
from typing import Any

from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor

from train.export.ldm_names import unet_names

PREFIX = "unet."
"""Begins every name in an adapter of a UNet in diffusers' format."""


def in_kohya_format(
    adapter: Mapping[str, Tensor], unet: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Convert an adapter in diffusers' format; `unet` is the UNet's configuration.

    Returns the tensors and the file's metadata. sd-scripts trains SD1.x and SD2.x on diffusers'
    UNet, and SDXL on the original one: so its layers have the names of the latter.
    """
    is_sdxl = unet.get("addition_embed_type") == "text_time"
    layers = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in adapter}
    names = (
        unet_names(layers, unet["layers_per_block"]) if is_sdxl else {one: one for one in layers}
    )
    renamed = {
        f"{PREFIX}{names[name.removeprefix(PREFIX).partition('.lora_')[0]]}.lora_{end}": weight
        for name, weight in adapter.items()
        for end in (name.partition(".lora_")[2],)
    }
    tensors = convert_state_dict_to_kohya(renamed)
    ranks = {len(tensor) for name, tensor in tensors.items() if ".lora_down." in name}
    version = "sd_v2" if unet.get("cross_attention_dim") == 1024 else "sd_v1"
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(ranks)),  # the scale is in the weights
        "ss_base_model_version": "sdxl_base_v1-0" if is_sdxl else version,
    }
    return {name: tensor.float() for name, tensor in tensors.items()}, metadata
