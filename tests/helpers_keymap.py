"""open_clip's names of CLIP weights -> Hugging Face's, so that one class can run both.

PickScore, HPSv2 and plain CLIP are the same architecture under two naming schemes; the map is a
renaming except that open_clip fuses q, k and v and stores its projections transposed.
"""

import re
from collections.abc import Mapping

from torch import Tensor

PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # [sic], in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
FUSED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
IGNORED = {"attn_mask"}
"""A buffer of old checkpoints that both libraries compute themselves."""


def open_clip_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under `transformers.CLIPModel`'s names.

    Raises:
        ValueError: Names a key that no CLIP of open_clip has.
    """
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in PLAIN:
            mapped[PLAIN[key]] = value
        elif key in TRANSPOSED:
            mapped[TRANSPOSED[key]] = value.T.contiguous()
        elif match := FUSED.fullmatch(key):
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                mapped[f"{_layer(match[1], match[2])}.self_attn.{part}_proj.{match[3]}"] = chunk
        elif (match := BLOCK.fullmatch(key)) and match[3] in IN_BLOCK:
            mapped[f"{_layer(match[1], match[2])}.{IN_BLOCK[match[3]]}.{match[4]}"] = value
        elif key not in IGNORED:
            raise ValueError(f"{key!r} is no weight of an open_clip CLIP with plain transformers")
    return mapped


def _layer(visual: str | None, number: str) -> str:
    return f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
