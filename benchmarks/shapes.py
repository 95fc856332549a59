"""Shapes of the published models, and of smaller ones like them, with random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.random_weights import build_place

MINIATURE = Path("data/miniature/weights/base")

SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
}  # fmt: skip
SD21 = SD15 | {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}  # fmt: skip
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}  # fmt: skip
"""The published UNets, as `UNet2DConditionModel` takes them; what they call the head dimension is
the number of heads."""

SD3_MEDIUM = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24,
    "caption_projection_dim": 1536, "pos_embed_max_size": 192,
}  # fmt: skip
SD35_MEDIUM = SD3_MEDIUM | {
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
SD35_LARGE = SD3_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}  # fmt: skip
"""The published transformers, as `SD3Transformer2DModel` takes them."""
FLUX_SCHNELL: dict[str, Any] = {}
FLUX_DEV = {"guidance_embeds": True}
"""The published transformers, as `FluxTransformer2DModel` takes them; its defaults are theirs."""
Z_IMAGE: dict[str, Any] = {}
"""The published transformer, as `ZImageTransformer2DModel` takes it; it has the default shape."""
SANA: dict[str, Any] = {}
"""Sana of 1.6 billion parameters, as `SanaTransformer2DModel` takes it; its defaults are theirs."""
QWEN_IMAGE: dict[str, Any] = {}
"""The published transformer, as `QwenImageTransformer2DModel` takes it; it is the default."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A CLIP text encoder; its heads are 64 wide, or all of it."""

    width: int
    layers: int
    pooled: int | None = None
    """Width of the projected whole prompt; SDXL's second tower has it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model; two towers make it SDXL's kind."""

    unet: Mapping[str, Any]
    vae: tuple[int, ...]
    """Channels of the VAE's levels; three halvings."""
    towers: tuple[Tower, ...]


VAE = (128, 256, 512, 512)
SHAPES = {
    "sd15": Shape(unet=SD15, vae=VAE, towers=(Tower(width=768, layers=12),)),
    "sdxl": Shape(
        unet=SDXL, vae=VAE,
        towers=(Tower(width=768, layers=12), Tower(width=1280, layers=32, pooled=1280)),
    ),
    "reduced": Shape(
        unet=SD15 | {
            "sample_size": 32, "cross_attention_dim": 256, "attention_head_dim": 2,
            "block_out_channels": (64, 128, 256, 256),
        },
        vae=(24, 48, 96, 96), towers=(Tower(width=256, layers=4),),
    ),
    "quick": Shape(
        unet={
            "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 4,
            "block_out_channels": (32, 64), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        vae=(8, 8, 8, 8), towers=(Tower(width=32, layers=2),),
    ),
    "quick_xl": Shape(
        unet=SDXL | {
            "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": (2, 4, 4),
            "block_out_channels": (32, 64, 64), "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        vae=(8, 8, 8, 8), towers=(Tower(width=32, layers=2), Tower(width=32, layers=2, pooled=32)),
    ),
}  # fmt: skip
"""`reduced` is SD1.5 at a fifth of its width, with fewer heads so that each is about as wide as
there: UNet and VAE share the work as in SD1.5 (the VAE's two images are 28 % of a pair's passes
through the UNets; there 35 %)."""


def write_model(shape: Shape, folder: Path) -> None:
    """A diffusers folder of a shape."""
    torch.manual_seed(0)
    device, dtype = build_place()
    with device:
        texts = [text_encoder(tower) for tower in shape.towers]
        networks = [*texts, _vae(shape), UNet2DConditionModel(**shape.unet)]
    for network in networks:
        nn.Module.to(network, dtype)  # the libraries' own warns
    *_, vae, unet = networks
    names = [
        f"{part}{end}" for end in ("", "_2")[: len(texts)] for part in ("tokenizer", "text_encoder")
    ]
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": scheduler}
    parts |= zip(names, [part for text in texts for part in (clip_tokenizer(), text)], strict=True)
    pipeline: DiffusionPipeline
    if len(texts) == 1:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.save_pretrained(folder)


def _vae(shape: Shape) -> AutoencoderKL:
    levels = len(shape.vae)
    return AutoencoderKL(
        block_out_channels=shape.vae, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=2, latent_channels=4,
        norm_num_groups=min(32, shape.vae[0]),
    )  # fmt: skip


def clip_tokenizer() -> Any:
    """The miniature's words, with CLIP's length."""
    return CLIPTokenizer.from_pretrained(MINIATURE, subfolder="tokenizer", model_max_length=77)


def text_encoder(tower: Tower) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A tower with random weights."""
    tokens = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=tower.width, intermediate_size=4 * tower.width,
        num_hidden_layers=tower.layers, num_attention_heads=max(1, tower.width // 64),
        max_position_embeddings=77, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
        projection_dim=tower.pooled or 512,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if tower.pooled else CLIPTextModel(config)
