"""Trains the miniature's generator: autoencoder, text encoder and UNet of a Stable Diffusion."""

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from data.miniature.tokenizer import CONTEXT, hf_tokenizer
from data.miniature.training import Average, Plan, captioned, fit, imagined, to_signed

WIDTH = 64
"""Width of the text states, which the UNet attends to."""
CAPTION_DROPOUT = 0.1
"""Share of captions replaced by the empty one, as classifier-free guidance needs."""
EMA = 0.996
"""Decay per step of the averaged weights."""


def new_vae() -> AutoencoderKL:
    """An autoencoder of Stable Diffusion's build: factor 8, four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def train_vae(rounds: tuple[Plan, Plan, Plan], num_images: int, seed: int) -> AutoencoderKL:
    """Train the autoencoder on images of every look: backgrounds, then shapes, then edges.

    The third round is of the decoder alone: the latents stay as they are.
    """
    backgrounds, shapes, edges = rounds
    torch.manual_seed(seed)
    vae = new_vae()
    fit_vae(vae, backgrounds, num_images, seed, shape_counts=False)
    fit_vae(vae, shapes, num_images, seed + 1, shape_counts=True)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    fit_vae(vae, edges, num_images, seed + 2, shape_counts=True)
    return vae


def fit_vae(vae: AutoencoderKL, plan: Plan, num_images: int, seed: int, shape_counts: bool) -> None:
    """One round of training; `shape_counts` lets the shape weigh as much as the background.

    The scaling factor is measured at the end unless the encoder is frozen.
    """
    pixels = captioned(num_images, seed, fault_rate=0.0, quality=(0.0, 1.0)).pixels
    torch.manual_seed(seed)

    def loss_of(indices: Tensor) -> Tensor:
        images = to_signed(pixels[indices.numpy()])
        latents = vae.encode(images).latent_dist
        gap = vae.decode(latents.sample()).sample.float() - images
        error = gap.square() + 0.3 * gap.abs()
        if shape_counts:
            error = error * shape_weight(images)
        divergence: Tensor = latents.kl().mean() / latents.mean[0].numel()
        loss: Tensor = error.mean() + 1e-5 * divergence
        return loss

    fit("autoencoder", [vae], loss_of, num_images, plan)
    if not vae.quant_conv.weight.requires_grad:
        return
    spread = encode(vae, pixels[:1024]).std().item() / vae.config.scaling_factor
    vae.register_to_config(scaling_factor=round(1 / spread, 4))


def shape_weight(images: Tensor) -> Tensor:
    """Pixel weights (n x 1 x h x w) under which shape and background count alike; mean 1."""
    top, bottom = images[..., 0, :], images[..., -1, :]
    left, right = images[..., :, 0], images[..., :, -1]
    paper = torch.cat([top, bottom, left, right], -1).median(-1).values[..., None, None]
    away = (images - paper).abs().amax(1, keepdim=True)
    shape = (away > 0.35 * away.amax((2, 3), keepdim=True)).float()
    shape = functional.max_pool2d(shape, 3, 1, 1)
    covered = shape.mean((2, 3), keepdim=True).clamp(0.01, 0.99)
    weight: Tensor = 0.5 * shape / covered + 0.5 * (1 - shape) / (1 - covered)
    return weight


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> Tensor:
    """Mean latents of images times the scaling factor, so that their spread is near 1."""
    batches = [to_signed(pixels[i : i + 64]) for i in range(0, len(pixels), 64)]
    scale = float(vae.config.scaling_factor)
    return scale * torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])


def new_text_encoder() -> CLIPTextModel:
    """Stable Diffusion's text encoder, small."""
    tokenizer = hf_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet with two resolutions, 8x8 and 4x4 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        prediction_type="epsilon", steps_offset=1, clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip


def train_unet(
    vae: AutoencoderKL, plan: Plan, num_images: int, seed: int
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Train UNet and text encoder together on an imperfect corpus; keeps the averaged weights."""
    corpus = imagined(num_images, seed)
    latents = encode(vae, corpus.pixels)
    torch.manual_seed(seed)
    text_encoder, unet, scheduler = new_text_encoder(), new_unet(), new_scheduler()
    tokenizer = hf_tokenizer()
    tokens = tokenizer(corpus.prompts, padding="max_length", return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids

    def loss_of(indices: Tensor) -> Tensor:
        dropped = torch.rand(len(indices), 1) < CAPTION_DROPOUT
        states = text_encoder(torch.where(dropped, empty, tokens[indices])).last_hidden_state
        clean = latents[indices]
        noise, t = torch.randn_like(clean), torch.randint(1000, (len(indices),))
        predicted = unet(scheduler.add_noise(clean, noise, t), t, states).sample
        return functional.mse_loss(predicted.float(), noise)

    models = (text_encoder, unet)
    averages = [Average(model, EMA) for model in models]
    fit("unet", models, loss_of, num_images, plan, averages)
    for average in averages:
        average.store()
    return text_encoder, unet
