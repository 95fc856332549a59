"""Trains the miniature's flow-matching generator: the transformer of a Stable Diffusion 3.

Autoencoder and text encoders were trained before and stay as they are. The text encoders are the
towers of `clip` and `pickscore`, as Stable Diffusion 3 has those of two published CLIPs. There is
no T5.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection

from data.families.sd3 import FAMILY, T5_TOKENS
from data.miniature.tokenizer import CONTEXT, hf_tokenizer
from data.miniature.train_base import CAPTION_DROPOUT, WIDTH, encode
from data.miniature.training import Average, Plan, fit, imagined
from data.models.family import ModelConfig, PromptEmbeds

HEADS, HEAD_WIDTH, LAYERS = 3, 32, 4
EMA = 0.999
"""Decay per step of the averaged weights."""


def new_transformer() -> SD3Transformer2DModel:
    """Stable Diffusion 3's transformer over 4 x 4 patches of 2 x 2 latents, 1.3 million parameters.

    Its blocks begin as the identity and its output as zero (adaLN-Zero, Peebles and Xie 2023).
    """
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, pos_embed_max_size=4, in_channels=4, out_channels=4,
        num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )  # fmt: skip
    zeros = [m.linear for m in transformer.modules() if isinstance(m, AdaLayerNormZero)]
    for layer in (*zeros, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


class EqualPadding:
    """SD3's joint attention in which the last token of the text stands for T5_TOKENS equal ones.

    Without T5 the pipeline appends that many rows of zeros to the text. They have no positions, so
    they stay equal to each other in every block, and attending to all of them is attending to one
    whose logit is log(T5_TOKENS) higher. The result is the same, at an eighth of the cost.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The attention's outputs for image and text."""

        def heads(of_image: nn.Module, of_text: nn.Module) -> Tensor:
            joint = torch.cat([of_image(hidden_states), of_text(encoder_hidden_states)], dim=1)
            return joint.reshape(*joint.shape[:2], attn.heads, -1).transpose(1, 2)

        query = heads(attn.to_q, attn.add_q_proj)
        logits = query.new_zeros(1, query.shape[2])
        logits[:, -1] = math.log(T5_TOKENS)
        joint = functional.scaled_dot_product_attention(
            query, heads(attn.to_k, attn.add_k_proj), heads(attn.to_v, attn.add_v_proj),
            attn_mask=logits.expand(query.shape[2], -1),
        ).transpose(1, 2).flatten(2)  # fmt: skip
        image, text = joint.tensor_split([hidden_states.shape[1]], dim=1)
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[0](image), text


@torch.no_grad()
def encode_prompts(
    encoders: Sequence[CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
    prompts: Sequence[str],
) -> PromptEmbeds:
    """The prompts as the pipeline encodes them, of T5's equal rows only the first."""
    tokenizer = hf_tokenizer()
    tokens = tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids

    def call(encoder: CLIPTextModelWithProjection) -> Any:
        return lambda _, **options: encoder(tokens, **options)

    files = ModelConfig(index={}, denoiser=transformer.config, vae={}, scheduler={})
    calls = dict(zip(("text_encoder", "text_encoder_2"), map(call, encoders), strict=True))
    text = FAMILY.encode(calls, prompts, files)
    return PromptEmbeds(text.states[:, : CONTEXT + 1].clone(), text.pooled)


def scale_for_flow(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> None:
    """Measure shift and factor, under which the images' latents have mean 0 and spread 1."""
    latents = encode(vae, pixels) / vae.config.scaling_factor
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )


def train_flow(
    vae: AutoencoderKL,
    encoders: Sequence[CLIPTextModelWithProjection],
    plan: Plan,
    num_images: int,
    seed: int,
) -> StableDiffusion3Pipeline:
    """Train the transformer on an imperfect corpus; keeps the averaged weights.

    The noise's fraction is logit-normal (Esser et al. 2024, section 3.1). The scaling factors of
    `vae` are measured.
    """
    corpus = imagined(num_images, seed)
    scale_for_flow(vae, corpus.pixels[:1024])
    shift = vae.config.scaling_factor * vae.config.shift_factor
    latents = encode(vae, corpus.pixels) - shift
    torch.manual_seed(seed)
    transformer = new_transformer()
    transformer.set_attn_processor(EqualPadding())
    prompts = ["", *sorted(set(corpus.prompts))]
    text = encode_prompts(encoders, transformer, prompts)
    rows = torch.tensor([prompts.index(prompt) for prompt in corpus.prompts])

    def loss_of(indices: Tensor) -> Tensor:
        kept = torch.rand(len(indices)) >= CAPTION_DROPOUT
        given = text.rows(rows[indices] * kept)  # row 0 is the empty prompt
        clean, sigma = latents[indices], torch.randn(len(indices), 1, 1, 1).sigmoid()
        noise = torch.randn_like(clean)
        predicted = transformer(
            (1 - sigma) * clean + sigma * noise,
            encoder_hidden_states=given.states,
            pooled_projections=given.pooled,
            timestep=1000 * sigma.flatten(),
        ).sample
        return functional.mse_loss(predicted.float(), noise - clean)

    average = Average(transformer, EMA)
    fit("flow", [transformer], loss_of, num_images, plan, [average])
    average.store()
    transformer.set_attn_processor(JointAttnProcessor2_0())
    return _pipeline(vae, encoders, transformer)


def _pipeline(
    vae: AutoencoderKL,
    encoders: Sequence[CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    first, second = encoders
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=first,
        tokenizer=hf_tokenizer(),
        text_encoder_2=second,
        tokenizer_2=hf_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
