"""Names of a UNet's layers in the original Stable Diffusion code (CompVis' LDM, Stability's SGM).

diffusers only reads them (`convert_ldm_unet_checkpoint`); this is the way back. The original code
counts through the blocks: each of diffusers' has `layers_per_block` numbers and one more, for its
downsampler on the way down and for its last layer on the way up.
"""

import re
from collections.abc import Iterable

AT_THE_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
IN_A_BLOCK = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<layer>\d+)\.(?P<rest>.+)"
)
IN_THE_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)")


def ldm_names(layers: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Map the names of a UNet's layers in diffusers to those of the original code.

    Raises:
        ValueError: The original code has no such layer.
    """
    names = sorted(layers)
    attended = {match[0] for name in names if (match := re.match(r"up_blocks\.\d+\.atten", name))}
    return {name: _ldm_name(name, layers_per_block, attended) for name in names}


def _ldm_name(name: str, layers_per_block: int, attended: set[str]) -> str:
    if name in AT_THE_ENDS:
        return AT_THE_ENDS[name]
    if match := IN_THE_MIDDLE.fullmatch(name):
        layer, attention = int(match["layer"]), match["kind"] == "attentions"
        return f"middle_block.{2 * layer + attention}.{_inner(match)}"
    match = IN_A_BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"the original Stable Diffusion has no layer like {name}")
    first, layer = int(match["block"]) * (layers_per_block + 1), int(match["layer"])
    if match["kind"] == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if match["kind"] == "upsamplers":
        place = 1 + (f"up_blocks.{match['block']}.atten" in attended)
        return f"output_blocks.{first + layers_per_block}.{place}.conv"
    where = f"input_blocks.{first + layer + 1}" if match["way"] == "down" else None
    where = where or f"output_blocks.{first + layer}"
    return f"{where}.{int(match['kind'] == 'attentions')}.{_inner(match)}"


def _inner(match: re.Match[str]) -> str:
    """The name inside a resnet or an attention; the original code has the latter's names."""
    return IN_A_RESNET[match["rest"]] if match["kind"] == "resnets" else match["rest"]
