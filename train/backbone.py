"""The model's parts in a diffusers folder: VAE, text encoder, UNet, noise schedule.

VAE and text encoder are frozen and stay outside DeepSpeed; so does the reference under ZeRO 0 to 2.
Everything is in evaluation mode, policy included: with dropout the policy and its own copy would
disagree, and the margin would not start at 0.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from train.config import ModelSpec, Precision
from train.noise import NoiseSchedule, Prediction
from train.prefetch import onto

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}

FAMILIES = ("StableDiffusionPipeline",)
"""Pipelines that can be aligned; SDXL needs a second text encoder and time ids in `Condition`."""

Denoiser = Callable[..., Any]
"""A UNet, or DeepSpeed's engine around it."""

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Condition:
    """What the UNet is told besides the noisy latents; one row an image."""

    states: Float[Tensor, "image token width"]
    added: dict[str, Tensor] | None = None
    """`added_cond_kwargs` of the UNet; SDXL's pooled text and time ids."""

    def for_pairs(self) -> "Condition":
        """The same for winners and losers, which follow each other."""
        added = self.added and {name: torch.cat([t, t]) for name, t in self.added.items()}
        return Condition(torch.cat([self.states, self.states]), added)


@dataclass(frozen=True, slots=True)
class Backbone:
    """The frozen parts, and how to make a UNet."""

    folder: Path
    resolution: int
    device: torch.device
    dtype: torch.dtype
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    schedule: NoiseSchedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a training picture's latents."""
        config = self.vae.config
        side = self.resolution // 2 ** (len(config.block_out_channels) - 1)
        return (config.latent_channels, side, side)

    def unet(self) -> UNet2DConditionModel:
        """The base's UNet in this precision; the start of the policy and of the reference."""
        unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(
            self.folder, subfolder="unet", torch_dtype=self.dtype, use_safetensors=True
        )
        return unet.to(self.device).eval()

    @torch.no_grad()
    def encode_pictures(
        self,
        pixels: UInt8[Tensor, "image height width 3"],
        posterior: Float[Tensor, "image channel height_8 width_8"],
    ) -> Float[Tensor, "image channel height_8 width_8"]:
        """Latents scaled as the UNet expects, drawn from the VAE's posterior by `posterior`."""
        signed = pixels.to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        found = self.vae.encode(signed).latent_dist
        latents: Tensor = found.mean.float() + found.std.float() * posterior.to(self.device)
        shift = float(self.vae.config.shift_factor or 0.0)
        return (latents - shift) * float(self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "image channel height_8 width_8"]
    ) -> UInt8[Tensor, "image height width 3"]:
        """The pictures of latents, one at a time to bound the memory."""
        shift = float(self.vae.config.shift_factor or 0.0)
        scaled = latents / float(self.vae.config.scaling_factor) + shift
        signed = torch.cat([self.vae.decode(one[None].to(self.vae.dtype))[0] for one in scaled])
        pixels = ((signed.float() + 1) * 127.5).round().clamp(0, 255)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Text states of each prompt; each distinct one is encoded once."""
        distinct = sorted(set(prompts))
        tokens = self.tokenizer(
            distinct,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        states = self.text_encoder(onto(tokens.input_ids, self.device))[0]
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return Condition(states[onto(rows, self.device)])


def predict(
    unet: Denoiser,
    noisy: Float[Tensor, "image channel height width"],
    timestep: Int[Tensor, " image"],
    condition: Condition,
    dtype: torch.dtype,
) -> Float[Tensor, "image channel height width"]:
    """One forward pass of a denoiser; float32 whatever it computes in."""
    predicted: Tensor = unet(
        noisy.to(dtype),
        timestep,
        encoder_hidden_states=condition.states,
        added_cond_kwargs=condition.added,
        return_dict=False,
    )[0]
    return predicted.float()


def load_backbone(spec: ModelSpec, precision: Precision, device: torch.device) -> Backbone:
    """Load the frozen parts of a diffusers folder.

    Raises:
        ValueError: The model is no folder, of another family, or does not fit the resolution.
    """
    folder = model_folder(spec)
    dtype = DTYPES[precision]

    def part(kind: Any, name: str) -> Any:
        loaded = kind.from_pretrained(
            folder, subfolder=name, torch_dtype=dtype, use_safetensors=True
        )
        return loaded.to(device).eval().requires_grad_(requires_grad=False)

    vae = part(AutoencoderKL, "vae")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if spec.resolution % factor:
        raise ValueError(
            f"model.resolution={spec.resolution} is no multiple of {factor}, the VAE's factor"
        )
    return Backbone(
        folder=folder,
        resolution=spec.resolution,
        device=device,
        dtype=dtype,
        vae=vae,
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        text_encoder=part(CLIPTextModel, "text_encoder"),
        schedule=noise_schedule(folder, device),
    )


def model_folder(spec: ModelSpec) -> Path:
    """The model's folder on this machine, checked to be one that can be aligned."""
    folder = Path(spec.path).expanduser()
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"model.path={spec.path} is not a diffusers folder (no model_index.json); give one, "
            "e.g. from `hf download ... --revision ... --local-dir ...`"
        )
    family = json.loads(index.read_text()).get("_class_name")
    if family not in FAMILIES:
        raise ValueError(f"model.path={spec.path} is a {family}; allowed are {', '.join(FAMILIES)}")
    return folder


def noise_schedule(folder: Path, device: torch.device) -> NoiseSchedule:
    """The forward process in the model's scheduler settings."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    found = scheduler.config.prediction_type
    allowed = [kind.value for kind in Prediction]
    if found not in allowed:
        raise ValueError(f"{folder}/scheduler predicts {found!r}; allowed are {', '.join(allowed)}")
    return NoiseSchedule(scheduler.alphas_cumprod.float().to(device), Prediction(found))
