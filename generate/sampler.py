"""Draws images with any diffusers model, from noise that belongs to (prompt, seed) alone.

So every model starts from the same noise, and no image depends on the batch it was drawn in, on
the number of processes, or on what was drawn before.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers.utils import logging as transformers_logging

from data.artifacts.atomic import write_bytes
from data.dtypes import Dtype
from data.images import encode_png
from generate.config import Scheduler
from generate.image_files import Model, Sample, SamplesError, missing

SLICED_ABOVE = 512
"""Sides in pixels from which the decoder takes one image at a time, to bound its memory."""


@runtime_checkable
class Draws(Protocol):
    """Anything that draws one image for each prompt and seed."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> UInt8[np.ndarray, "image height width 3"]:
        """The images, in order."""
        ...


def device_of(name: str, local_rank: int) -> torch.device:
    """The device of a process; with `auto` or `cuda` each takes its own GPU.

    Raises:
        SamplesError: A GPU is asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SamplesError(f"evaluate.device={name}, but torch sees no GPU; use auto or cpu")
    if name in ("auto", "cuda"):
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise SamplesError(f"evaluate.device={name!r}; use auto, cpu, cuda or cuda:N") from error


def generator(prompt: str, seed: int, use: str) -> torch.Generator:
    """The random numbers of one image, for one use; a function of these three alone."""
    key = blake2b(f"{use}/{seed}/{prompt}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def initial_noise(
    prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int]
) -> Float[Tensor, "image channel height width"]:
    """Standard normal latents to start from, drawn in fp32 on the CPU whatever the device is."""
    return torch.stack(
        [
            torch.randn(shape, generator=generator(prompt, seed, "latents"))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )


class ImageGenerator:
    """A diffusers pipeline that draws batches from given noise."""

    def __init__(
        self, pipeline: Any, device: torch.device, *, resolution: int, steps: int, guidance: float
    ) -> None:
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.settings = {
            "height": resolution,
            "width": resolution,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
        }
        side = resolution // pipeline.vae_scale_factor
        self.shape = (pipeline.unet.config.in_channels, side, side)
        if resolution >= SLICED_ABOVE:
            pipeline.vae.enable_slicing()

    @classmethod
    def load(
        cls,
        model: Model,
        device: torch.device,
        *,
        scheduler: Scheduler,
        dtype: Dtype,
        resolution: int,
        steps: int,
        guidance: float,
    ) -> "ImageGenerator":
        """Read a model's folder (safetensors only, no code from it).

        Raises:
            SamplesError: The folder holds no pipeline with a UNet and a VAE, or the LoRA weights
                are not for it.
        """
        for library in (logging, transformers_logging):
            library.disable_progress_bar()
            library.set_verbosity_error()  # else each long prompt is reported as cut
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                model.path,
                revision=model.revision,
                dtype=dtype.torch,
                use_safetensors=True,
                **_without_safety_checker(model),
            )
        except (OSError, ValueError) as error:
            raise SamplesError(
                f"model {model.name!r} ({model.path}) cannot be loaded: {error}"
            ) from error
        if model.adapter:
            _load_adapter(pipeline, model)
        if getattr(pipeline, "watermark", None) is not None:
            pipeline.watermark = None  # SDXL's, where its library is installed: judges see pixels
        if scheduler is Scheduler.ddim:
            pipeline.scheduler = deterministic(pipeline.scheduler)
        return cls(pipeline, device, resolution=resolution, steps=steps, guidance=guidance)

    @torch.inference_mode()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> UInt8[np.ndarray, "image height width 3"]:
        """One image for each prompt and seed."""
        noise = initial_noise(prompts, seeds, self.shape)
        steps = [generator(p, s, "steps") for p, s in zip(prompts, seeds, strict=True)]
        output = self.pipeline(
            prompt=list(prompts),
            latents=noise.to(self.pipeline.device, self.pipeline.unet.dtype),
            generator=steps,  # for schedulers that add noise at every step
            output_type="pt",
            **self.settings,
        ).images
        pixels = (output.float() * 255).round().clamp(0, 255).to(torch.uint8)
        return np.asarray(pixels.permute(0, 2, 3, 1).cpu())


def deterministic(scheduler: Any) -> DDIMScheduler:
    """DDIM on another scheduler's noise schedule, without its clipping of pixel-space models."""
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)


def _load_adapter(pipeline: Any, model: Model) -> None:
    file = Path(model.adapter)
    try:
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, use_safetensors=True, local_files_only=True
        )
        loaded = pipeline.get_active_adapters()
    except (OSError, ValueError, RuntimeError) as error:
        raise SamplesError(
            f"model {model.name!r}: the LoRA weights {file} cannot be loaded on {model.path}: "
            f"{error}"
        ) from error
    if not loaded:
        raise SamplesError(
            f"model {model.name!r}: {file} has no LoRA weights for the UNet or the text encoders "
            f"of {model.path}; give the base that it was made for (model.path=...)"
        )


def _without_safety_checker(model: Model) -> dict[str, Any]:
    """Stable Diffusion's checker blackens images, which no judge can compare."""
    index = Path(model.path) / "model_index.json"
    if index.is_file() and "safety_checker" in json.loads(index.read_text()):
        return {"safety_checker": None, "requires_safety_checker": False}
    return {}


def draw_missing(
    draws: Draws, samples: Sequence[Sample], batch: int, drawn: Callable[[int], None]
) -> None:
    """Draw what is not there yet, and write each image whole; `drawn` hears how many were added.

    A device that runs out of memory gets half the batch, for the rest of the run.

    Raises:
        SamplesError: One image alone is too much for the device.
    """
    left = missing(samples)
    while left:
        part = missing(left[:batch])  # another process may have drawn some by now
        pixels = _attempt(draws, part) if part else np.empty(0)
        if pixels is None:
            if batch == 1:
                raise SamplesError(
                    f"the device has not the memory to draw one image of {part[0].model!r}; "
                    "lower model.resolution or choose evaluate.dtype=bf16"
                )
            batch = max(1, min(batch, len(part)) // 2)
            continue
        for sample, image in zip(part, pixels, strict=True):
            write_bytes(sample.path, encode_png(image))
        left = left[batch:]
        drawn(len(part))


def _attempt(draws: Draws, samples: Sequence[Sample]) -> np.ndarray | None:
    """The images, or None when they need more memory than the device has."""
    try:
        return draws.draw([s.prompt.text for s in samples], [s.seed for s in samples])
    except torch.OutOfMemoryError:
        pass  # the cache is emptied outside, when the failed batch's tensors are gone
    torch.cuda.empty_cache()
    return None
