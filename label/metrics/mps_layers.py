"""The layers that MPS puts on CLIP: image tokens look at the prompt's, then at each other.

As published (Zhang et al. 2024), after lucidrains' CoCa: all heads share one key and one value,
rotary positions inside an image, SwiGLU, no biases in linear layers.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

OFFICIAL = re.compile(r"layers\.(\d+)\.([01])\.fn\.(.+)")
IN_LAYER = {
    ("0", "norm.weight"): "across.norm.weight",
    ("0", "norm.bias"): "across.norm.bias",
    ("0", "to_q.weight"): "across.query.weight",
    ("0", "to_kv.weight"): "across.key_value.weight",
    ("0", "to_out.weight"): "across.out.weight",
    ("0", "ff.0.weight"): "across.widen.weight",
    ("0", "ff.2.weight"): "across.narrow.weight",
    ("1", "norm.weight"): "within.norm.weight",
    ("1", "norm.bias"): "within.norm.bias",
    ("1", "rotary_emb.inv_freq"): "within.frequencies",
    ("1", "fused_attn_ff_proj.weight"): "within.fused.weight",
    ("1", "attn_out.weight"): "within.out.weight",
    ("1", "ff_out.1.weight"): "within.narrow.weight",
}


class CrossModel(nn.Module):
    """Image tokens -> image tokens that know the prompt."""

    def __init__(self, dim: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        heads, head_dim, inner = config["num_heads"], config["head_dim"], dim * config["widening"]
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "across": Across(dim, heads, head_dim, inner),
                    "within": Within(dim, heads, head_dim, inner),
                }
            )
            for _ in range(config["num_layers"])
        )

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Number format of the layers; the rotary frequencies stay in fp32."""
        self.to(dtype)
        for layer in self.layers:
            layer["within"].frequencies = layer["within"].frequencies.float()  # type: ignore[index]

    def forward(
        self,
        image: Float[Tensor, "row patch dim"],
        prompt: Float[Tensor, "row token dim"],
        bias: Float[Tensor, "row 1 1 token"],
    ) -> Float[Tensor, "row patch dim"]:
        """`bias` is 0 for tokens of the prompt that may be seen and -inf for the others."""
        for layer in self.layers:
            image = image + layer["across"](image, prompt, bias)  # type: ignore[index]
            image = image + layer["within"](image)  # type: ignore[index]
        return image


class Across(nn.Module):
    """Attention from the image to the prompt, beside a feed-forward of the image alone."""

    def __init__(self, dim: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.widen = nn.Linear(dim, 2 * inner, bias=False)
        self.narrow = nn.Linear(inner, dim, bias=False)

    def forward(self, image: Tensor, prompt: Tensor, bias: Tensor) -> Tensor:
        """What is added to the image; the prompt comes in as it is, without a norm."""
        x = self.norm(image)
        query = split(self.query(x), self.heads)
        key, value = self.key_value(prompt).unsqueeze(1).chunk(2, dim=-1)
        seen = attend(query, key, value, bias.to(query.dtype))
        mixed: Tensor = self.out(seen) + self.narrow(swiglu(self.widen(x)))
        return mixed


class Within(nn.Module):
    """Attention of the image to itself and a feed-forward, side by side, from one projection."""

    frequencies: Tensor

    def __init__(self, dim: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = [heads * head_dim, head_dim, head_dim, 2 * inner]
        self.norm = nn.LayerNorm(dim)
        self.fused = nn.Linear(dim, sum(self.parts), bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.narrow = nn.Linear(inner, dim, bias=False)
        self.register_buffer("frequencies", torch.empty(head_dim // 2))

    def forward(self, image: Tensor) -> Tensor:
        """What is added to the image."""
        query, key, value, wide = self.fused(self.norm(image)).split(self.parts, dim=-1)
        place = torch.arange(image.shape[1], device=image.device, dtype=torch.float32)
        angle = torch.outer(place, self.frequencies).repeat(1, 2)
        query = turn(split(query, self.heads), angle)
        key, value = turn(key.unsqueeze(1), angle), value.unsqueeze(1)
        mixed: Tensor = self.out(attend(query, key, value, None)) + self.narrow(swiglu(wide))
        return mixed


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """(row, head, patch, dim) queries on one key and value for all heads -> (row, patch, dims)."""
    heads = query.shape[1]
    key, value = key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2)


def split(x: Tensor, heads: int) -> Tensor:
    """(row, patch, heads * dim) -> (row, head, patch, dim)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def swiglu(x: Tensor) -> Tensor:
    """The first half, gated by the second (Shazeer 2020)."""
    value, gate = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), in fp32; the halves are the coordinates that turn."""
    left, right = x.float().chunk(2, dim=-1)
    turned = x.float() * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()
    return turned.to(x.dtype)


def official_to_ours(key: str) -> str:
    """A published name below `cross_model.` under `CrossModel`'s names; an unknown one as it is."""
    if (match := OFFICIAL.fullmatch(key)) and (match[2], match[3]) in IN_LAYER:
        return f"layers.{match[1]}.{IN_LAYER[match[2], match[3]]}"
    return key
