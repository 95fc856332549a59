"""The model's parts in a diffusers folder: VAE, text encoders, denoiser, forward process.

VAE and text encoders are frozen and stay outside DeepSpeed, like the reference under ZeRO 0 to 2.
Everything is in evaluation mode, even the policy: with dropout the policy and its own copy would
disagree, and the margin would not start at 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from transformers.utils import logging as transformers_logging

from data.devices import Dtype, to_device
from data.families import check_whole
from data.images import Size
from data.models.autoencoder import decode_latents, encode_moments, encode_tiles
from data.models.family import Condition, PromptEmbeds
from data.models.forward_process import DiscreteProcess
from data.models.latent_scaling import scale_latents, unscale_latents
from data.models.noise_schedule import ForwardProcess, NoiseSchedule, rectified_flow
from data.models.text_encoders import EncodePrompts, encode_distinct, load_text_encoders
from data.models.vae_config import latent_channels
from train.config import ModelSpec, Precision, Quantize
from train.models.base_model import BaseModel, check_classes, open_model
from train.models.quantized import quantize

SLICED_ABOVE = 512
"""Sides in pixels above which the VAE takes one image at a time, to bound its memory."""

Denoiser = Callable[..., Any]
"""A UNet or a transformer, or DeepSpeed's engine around it."""

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class ModelComponents:
    """The frozen parts, and how to make a denoiser."""

    base: BaseModel
    resolution: int
    device: torch.device
    dtype: torch.dtype
    """The format of the denoiser and the text encoders."""
    vae: Any
    """The VAE, or its configuration without weights."""
    text: EncodePrompts
    """Encodes prompts, or reads them encoded."""
    schedule: ForwardProcess
    frozen_bytes: int
    """Memory of VAE and text encoders, as far as they are loaded."""
    quantize: Quantize = Quantize.none
    """How the denoiser's linear layers are stored."""

    @property
    def square(self) -> Size:
        """The size of the images where it is one, and of samples."""
        return Size(self.resolution, self.resolution)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Channels, height and width of the latents of images of a size."""
        factor = self.base.vae_factor
        channels = latent_channels(self.base.config.vae)
        return (channels, size.height // factor, size.width // factor)

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the noise schedule."""
        return self.schedule.num_timesteps

    def denoiser(self) -> Any:
        """Load the base's denoiser in this precision; policy and reference start from it."""
        family = self.base.family
        denoiser = getattr(diffusers, family.parts[family.denoiser]).from_pretrained(
            self.base.folder,
            subfolder=family.denoiser,
            torch_dtype=self.dtype,
            use_safetensors=True,
        )
        if self.quantize is not Quantize.none:
            quantize(denoiser, self.quantize, self.device)
        return denoiser.to(self.device).eval()

    def predict(
        self,
        denoiser: Denoiser,
        noisy: Float[Tensor, "image channel height width"],
        timestep: Shaped[Tensor, " image"],
        condition: Condition,
    ) -> Float[Tensor, "image channel height width"]:
        """Run a denoiser of this model; returns float32 whatever it computes in.

        `timestep` is what the denoiser is told, see `ForwardProcess.denoiser_timestep`.
        """
        family = self.base.family
        return family.predict(denoiser, noisy.to(self.dtype), timestep, condition).float()

    @torch.no_grad()
    def encode_images(
        self,
        pixels: UInt8[Tensor, "image height width 3"],
        posterior: Float[Tensor, "image channel height_8 width_8"],
    ) -> Float[Tensor, "image channel height_8 width_8"]:
        """Encode to scaled latents, drawn from the posterior by the noise `posterior`."""
        signed = pixels.to(self.device).permute(0, 3, 1, 2).to(self.vae.dtype) / 127.5 - 1
        return self.sample_posterior(encode_moments(self.vae, signed), posterior)

    def sample_posterior(
        self,
        moments: Float[Tensor, "image moment channel height_8 width_8"],
        posterior: Float[Tensor, "image channel height_8 width_8"],
    ) -> Float[Tensor, "image channel height_8 width_8"]:
        """Draw latents, scaled as the denoiser expects, by the noise `posterior`.

        `moments` are the mean and, optionally, the standard deviation of the VAE's posterior.
        """
        mean, *std = moments.to(self.device).float().unbind(1)
        latents: Tensor = mean + std[0] * posterior.to(self.device) if std else mean
        # The layout decides how a UNet rounds; it is the VAE's, also for moments read from files.
        latents = latents.contiguous(memory_format=torch.channels_last)
        return scale_latents(latents, self.base.latent_scale)

    @torch.no_grad()
    def condition(
        self,
        prompts: Sequence[str],
        size: Int[Tensor, "pair 2 2"],
        cut: Size,
        text: PromptEmbeds | None = None,
    ) -> Condition:
        """The condition of winners, then losers; each distinct prompt is encoded once.

        `size` and `cut` are those of a `PairBatch`; `text` are the prompts encoded, where they are
        already.
        """
        text = text or encode_distinct(self.text, prompts)
        both = size.transpose(0, 1).reshape(-1, 2)
        return self._condition(text.twice(), both, cut, self.base.guidance)

    @torch.no_grad()
    def condition_of_new(self, prompts: Sequence[str], guidance: float | None = None) -> Condition:
        """The condition of images to generate, one for each prompt: uncropped, of full size.

        `guidance` is for a guidance-distilled denoiser; None is that of training.
        """
        text = encode_distinct(self.text, prompts)
        size = torch.full((len(prompts), 2), self.resolution)
        usual = self.base.guidance
        guidance = usual if None in (guidance, usual) else guidance
        return self._condition(text, size, self.square, guidance)

    def _condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        text = text.to(self.device, self.dtype)
        condition = self.base.family.condition(text, size, cut, guidance)
        if condition.added is None:
            return condition
        added = {name: to_device(value, self.device) for name, value in condition.added.items()}
        return replace(condition, added=added)

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "image channel height_8 width_8"]
    ) -> Float[Tensor, "image 3 height width"]:
        """Decode latents to images in about [-1, 1], one at a time to bound the memory.

        What is not finite stays so: `as_pixels` would make black or white of it.
        """
        raw = unscale_latents(latents, self.base.latent_scale)
        images = [decode_latents(self.vae, one[None].to(self.vae.dtype)) for one in raw]
        return torch.cat(images).float()


def empty_denoiser(base: BaseModel) -> Any:
    """The base's denoiser without numbers, on the meta device."""
    family = base.family
    kind = getattr(diffusers, family.parts[family.denoiser])
    with torch.device("meta"):
        return kind.from_config(kind.load_config(base.folder, subfolder=family.denoiser))


def as_pixels(
    images: Float[Tensor, "image 3 height width"],
) -> UInt8[Tensor, "image height width 3"]:
    """Decoded images as bytes."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def load_components(
    spec: ModelSpec,
    precision: Precision,
    device: torch.device,
    *,
    with_vae: bool = True,
    texts: EncodePrompts | None = None,
    shift: float | None = None,
) -> ModelComponents:
    """Load the frozen parts of a model; without the VAE, only its configuration is loaded.

    `texts` reads encoded prompts, so that no text encoder is loaded; `shift` is
    `train.timesteps.shift`.

    Raises:
        ValueError: There is no such folder, its family is not supported, it does not fit the
            resolution, or a part of it (also the denoiser, loaded later) is damaged or incomplete.
    """
    base, dtype = open_model(spec), Dtype(precision.value).torch
    check_whole(base.folder, f"model.path={spec.path}")
    check_classes(spec, base)
    schedule = make_forward_process(base, spec.resolution, device, shift)

    parts: list[Any] = []
    if texts is None:
        encoders = load_text_encoders(base.folder, base.family, base.config, device, dtype)
        texts = partial(base.family.encode, encoders, config=base.config)
        parts += [encoder.model for encoder in encoders.values()]
    kind = getattr(diffusers, base.family.parts["vae"])
    if with_vae:
        vae = kind.from_pretrained(
            base.folder,
            subfolder="vae",
            torch_dtype=torch.float32 if base.vae_in_fp32 else dtype,
            use_safetensors=True,
        )
        parts.append(vae.to(device).eval().requires_grad_(requires_grad=False))
    else:
        with torch.device("meta"):  # takes no memory, computes nothing
            vae = kind.from_config(kind.load_config(base.folder, subfolder="vae"))
    if spec.resolution > SLICED_ABOVE:
        vae.enable_slicing()
    if spec.vae_tile is not None:
        encode_tiles(vae, spec.vae_tile, base.vae_factor)
    frozen = sum(parameter.nbytes for one in parts for parameter in one.parameters())
    return ModelComponents(
        base, spec.resolution, device, dtype, vae, texts, schedule, frozen, spec.quantize
    )


def make_forward_process(
    base: BaseModel, resolution: int, device: torch.device, shift: float | None = None
) -> ForwardProcess:
    """The forward process of a model, for images of this side; `shift` None is the model's."""
    process = base.process
    if isinstance(process, DiscreteProcess):
        return noise_schedule(process, device)
    patches = (resolution // base.vae_factor // base.family.patch) ** 2
    training = process.training_shift if shift is None else shift
    sampling = process.sampling_shift(patches)
    return rectified_flow(process.num_timesteps, training, sampling, device, process.terminal)


def noise_schedule(process: DiscreteProcess, device: torch.device) -> NoiseSchedule:
    """The noise of a discrete process, from diffusers' own betas."""
    scheduler = DDPMScheduler(
        num_train_timesteps=process.num_timesteps,
        beta_schedule=process.beta_schedule,
        beta_start=process.beta_start,
        beta_end=process.beta_end,
        trained_betas=list(process.trained_betas) if process.trained_betas else None,
        rescale_betas_zero_snr=process.zero_terminal_snr,
    )
    return NoiseSchedule(scheduler.alphas_cumprod.float().to(device), process.prediction)
