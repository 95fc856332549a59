"""SD3 and FLUX.1, published and reduced, as diffusers folders with random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import StableDiffusion3Pipeline as Sd3Pipeline
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from benchmarks.random_weights import build_place
from benchmarks.shapes import FLUX_DEV, SD35_MEDIUM, VAE, Tower, clip_tokenizer, text_encoder
from data.families import flux, sd3
from data.models.family import Family

T5_WIDTH = 4096
"""Of the published one, which is what a transformer takes by default."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class FlowShape:
    """A flow-matching model; T5's width is the transformer's `joint_attention_dim`."""

    family: Family
    transformer: Mapping[str, Any]
    towers: tuple[Tower, ...]
    t5_layers: int
    vae: tuple[int, ...]
    """Channels of the VAE's levels; three halvings."""


SD3_TOWERS = Tower(width=768, layers=12, pooled=768), Tower(width=1280, layers=32, pooled=1280)
FLOW_SHAPES = {
    "sd35_medium": FlowShape(
        family=sd3.FAMILY, t5_layers=1, vae=VAE, transformer=SD35_MEDIUM, towers=SD3_TOWERS
    ),
    "flux_third": FlowShape(
        family=flux.FAMILY, t5_layers=1, vae=VAE, towers=(Tower(width=768, layers=12),),
        transformer=FLUX_DEV | {"num_layers": 6, "num_single_layers": 13},
    ),
    "reduced_sd3": FlowShape(
        family=sd3.FAMILY, t5_layers=2, vae=(24, 48, 96, 96),
        transformer={
            "sample_size": 32, "num_layers": 8, "attention_head_dim": 64, "num_attention_heads": 5,
            "caption_projection_dim": 320, "joint_attention_dim": 512, "pos_embed_max_size": 24,
            "pooled_projection_dim": 256, "dual_attention_layers": (0, 1, 2, 3),
            "qk_norm": "rms_norm",
        },
        towers=(Tower(width=128, layers=2, pooled=128), Tower(width=128, layers=2, pooled=128)),
    ),
    "reduced_flux": FlowShape(
        family=flux.FAMILY, t5_layers=2, vae=(24, 48, 96, 96),
        transformer={
            "num_layers": 3, "num_single_layers": 6, "attention_head_dim": 64,
            "num_attention_heads": 5, "joint_attention_dim": 512, "pooled_projection_dim": 256,
            "axes_dims_rope": (8, 28, 28), "guidance_embeds": True,
        },
        towers=(Tower(width=256, layers=2),),
    ),
    "quick_sd3": FlowShape(
        family=sd3.FAMILY, t5_layers=1, vae=(8, 8, 8, 8),
        transformer={
            "sample_size": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "caption_projection_dim": 32, "joint_attention_dim": 64, "pos_embed_max_size": 8,
            "pooled_projection_dim": 64, "qk_norm": "rms_norm",
        },
        towers=(Tower(width=32, layers=1, pooled=32), Tower(width=32, layers=1, pooled=32)),
    ),
    "quick_flux": FlowShape(
        family=flux.FAMILY, t5_layers=1, vae=(8, 8, 8, 8),
        transformer={
            "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
        towers=(Tower(width=32, layers=1),),
    ),
}  # fmt: skip
"""`flux_third` has the width of FLUX.1 dev and a third of its blocks. The reduced ones have about a
fifth of the width and a third of the depth or less. A T5 has fewer layers than the published."""


def write_flow_model(shape: FlowShape, folder: Path) -> None:
    """A diffusers folder of a shape."""
    torch.manual_seed(0)
    device, dtype = build_place()
    kind = getattr(diffusers, shape.family.parts["transformer"])
    with device:
        texts = [text_encoder(tower) for tower in shape.towers]
        networks = [*texts, _t5(shape), _vae(shape), kind(**shape.transformer)]
    for network in networks:
        nn.Module.to(network, dtype)  # the libraries' own warns
    *texts, t5, vae, transformer = networks
    parts: dict[str, Any] = {"vae": vae, "transformer": transformer}
    for number, text in enumerate([*texts, t5]):
        end = f"_{number + 1}" if number else ""
        parts[f"text_encoder{end}"] = text
        parts[f"tokenizer{end}"] = _t5_tokenizer() if text is t5 else clip_tokenizer()
    dynamic = shape.family is flux.FAMILY
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    pipeline = FluxPipeline if dynamic else Sd3Pipeline
    pipeline(**parts).save_pretrained(folder)


def _t5(shape: FlowShape) -> T5EncoderModel:
    width = int(shape.transformer.get("joint_attention_dim", T5_WIDTH))
    config = T5Config(
        vocab_size=64, d_model=width, d_kv=64, d_ff=2 * width, num_layers=shape.t5_layers,
        num_heads=max(1, width // 64), feed_forward_proj="gated-gelu", pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5Tokenizer:
    words = [(letter, -3.0) for letter in LETTERS] + [(f"▁{letter}", -2.5) for letter in LETTERS]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def _vae(shape: FlowShape) -> AutoencoderKL:
    levels = len(shape.vae)
    return AutoencoderKL(
        block_out_channels=shape.vae, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=2, latent_channels=16,
        norm_num_groups=min(8, shape.vae[0]), scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
