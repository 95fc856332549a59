"""A Stable Diffusion pipeline with few, random weights, and judges without weights."""

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data.images import UnreadableImageError, decode, to_pixels

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE = 16
"""Images of the tiny pipeline; its latents are 4 x 8 x 8."""


def tiny_tokenizer():
    tokens = [
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)


def tiny_pipeline(seed, *, width=16):
    """A pipeline with random weights; its images depend on noise, prompt and `seed`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=32,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",), block_out_channels=(width,), layers_per_block=1,
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=SIDE,
        scaling_factor=0.5,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def write_tiny_model(folder, seed):
    tiny_pipeline(seed).save_pretrained(folder)
    return folder


class FakePanel:
    """A stand-in for `label.scoring.panel.Panel` whose judges look only at pixels."""

    names = ("bright", "red", "green", "truth")

    def __init__(self):
        self.calls = []

    def score(self, images, prompts, *, batch=64, workers=0):
        self.calls.append(len(images))
        rows = np.stack([self._row(image) for image in images])
        return dict(zip(self.names, rows.astype(np.float32).T, strict=True))

    def provenance(self):
        return {name: {"weights": "none"} for name in self.names}

    @staticmethod
    def _row(image):
        try:
            red, green, blue = to_pixels(decode(image)).reshape(-1, 3).mean(0) / 255
        except UnreadableImageError:
            return np.full(4, np.nan)
        return np.array([red + green + blue, red, green, blue])
