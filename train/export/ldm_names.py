"""Names of a model's layers in the original Stable Diffusion code (CompVis' LDM, Stability's SGM).

diffusers only reads them (`convert_ldm_unet_checkpoint`, `convert_ldm_vae_checkpoint`); this is the
way back. The original UNet counts through the blocks: each of diffusers' has `layers_per_block`
numbers and one more, for its downsampler on the way down and for its last layer on the way up.
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

IN_A_VAE = (
    (r"(encoder|decoder)\.conv_norm_out", r"\1.norm_out"),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", r"decoder.up.\1.block.\2"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", r"decoder.up.\1.upsample"),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.attn_1\.group_norm", ".attn_1.norm"),
    (r"\.attn_1\.to_([qkv])", r".attn_1.\1"),
    (r"\.attn_1\.to_out\.0", ".attn_1.proj_out"),
    (r"\.conv_shortcut", ".nin_shortcut"),
)
"""What is put for what, in this order; the decoder's blocks are counted from the other end."""

IN_OPEN_CLIP = (
    (r"embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_projection\.weight", "text_projection"),
    (r"final_layer_norm", "ln_final"),
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])", r".ln_\1"),
    (r"\.self_attn\.", ".attn."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
)


def unet_names(layers: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Map the names of a UNet's layers in diffusers to those of the original code.

    Raises:
        ValueError: The original code has no such layer.
    """
    names = sorted(layers)
    attended = {match[0] for name in names if (match := re.match(r"up_blocks\.\d+\.atten", name))}
    return {name: _unet_name(name, layers_per_block, attended) for name in names}


def _unet_name(name: str, layers_per_block: int, attended: set[str]) -> str:
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
    block = f"input_blocks.{first + layer + 1}"
    if match["way"] == "up":
        block = f"output_blocks.{first + layer}"
    return f"{block}.{int(match['kind'] == 'attentions')}.{_inner(match)}"


def _inner(match: re.Match[str]) -> str:
    """The name inside a resnet or an attention; the original code has the latter's names."""
    return IN_A_RESNET[match["rest"]] if match["kind"] == "resnets" else match["rest"]


def vae_name(tensor: str, num_blocks: int) -> str:
    """The original name of a VAE's tensor; `num_blocks` are those of its decoder."""
    for pattern, original in IN_A_VAE:
        tensor = re.sub(pattern, original, tensor)
    return re.sub(
        r"decoder\.up\.(\d+)", lambda match: f"decoder.up.{num_blocks - 1 - int(match[1])}", tensor
    )


def open_clip_name(tensor: str) -> str:
    """The name in OpenCLIP of a tensor of CLIP's text model, without `text_model.` at its start."""
    for pattern, original in IN_OPEN_CLIP:
        tensor = re.sub(pattern, original, tensor)
    return tensor
