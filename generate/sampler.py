"""Samples images with any diffusers model, from noise that depends on (prompt, seed) alone.

So every model starts from the same noise, and no image depends on the batch it is sampled in, on
the number of processes, or on what was sampled before.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers.utils import logging as transformers_logging

from data.artifacts.atomic import write_bytes
from data.devices import Dtype, is_out_of_memory
from data.images import encode_png
from data.models.family import ModelConfig
from data.models.forward_process import ProcessKind, process_kind
from generate.config import Scheduler
from generate.image_files import Model, Sample, SamplesError, missing
from generate.model_process import check_folder, check_process
from generate.pipelines import denoiser_of, family_of_pipeline, load_pipeline

SLICED_ABOVE = 512
"""From this side in pixels on, the VAE decodes one image at a time, to bound its memory."""


@runtime_checkable
class SamplesImages(Protocol):
    """Anything that samples one image for each prompt and seed."""

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> UInt8[np.ndarray, "image height width 3"]:
        """The images, in order."""
        ...


def generator(prompt: str, seed: int, use: str) -> torch.Generator:
    """The random numbers of one image, for one use; they depend on these three alone."""
    key = blake2b(f"{use}/{seed}/{prompt}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def initial_noise(
    prompts: Sequence[str], seeds: Sequence[int], shape: tuple[int, int, int]
) -> Float[Tensor, "image channel height width"]:
    """Standard normal latents to start from, drawn in fp32 on the CPU whatever the device."""
    return torch.stack(
        [
            torch.randn(shape, generator=generator(prompt, seed, "latents"))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )


class ImageGenerator:
    """A diffusers pipeline that samples batches of images from given noise."""

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        *,
        model: str,
        resolution: int,
        steps: int,
        guidance: float,
        offload: bool = False,
    ) -> None:
        """`model` names it in messages; `offload` is `evaluate.cpu_offload`."""
        self.pipeline, self.model, self.device = pipeline, model, device
        if offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        self._finite: list[Tensor] = []
        pipeline.vae.decoder.register_forward_hook(self._note_finite)
        self.pipeline.set_progress_bar_config(disable=True)
        self.settings = {
            "height": resolution,
            "width": resolution,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
        }
        self.family = family_of_pipeline(pipeline)
        self.denoiser = getattr(pipeline, denoiser_of(pipeline))
        self.shape = latent_shape(pipeline, resolution)
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
        offload: bool = False,
    ) -> "ImageGenerator":
        """Read a model's folder (safetensors only, no code from it).

        Raises:
            ValueError: A part of the folder is damaged or missing, it holds no pipeline that can
                be sampled, the scheduler does not fit its forward process, or the LoRA weights
                are not for it.
        """
        check_folder(model, scheduler)
        for library in (logging, transformers_logging):
            library.disable_progress_bar()
            library.set_verbosity_error()  # else every truncated prompt gives a warning
        pipeline = load_pipeline(model, dtype)
        if getattr(pipeline, "watermark", None) is not None:
            pipeline.watermark = None  # SDXL's, where its library is installed; it changes pixels
        pipeline.scheduler = _scheduler_for(pipeline, model, scheduler)
        return cls(
            pipeline,
            device,
            model=model.name,
            resolution=resolution,
            steps=steps,
            guidance=guidance,
            offload=offload,
        )

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> UInt8[np.ndarray, "image height width 3"]:
        """One image for each prompt and seed.

        Raises:
            SamplesError: An image is not finite, as of an overflow in half precision.
        """
        self._finite.clear()
        noise = initial_noise(prompts, seeds, self.shape)
        if self.family is not None:
            noise = self.family.pipeline_latents(noise)
        steps = [generator(p, s, "steps") for p, s in zip(prompts, seeds, strict=True)]
        output = self.pipeline(
            prompt=list(prompts),
            latents=noise.to(self.device, self.denoiser.dtype),
            generator=steps,  # for schedulers that add noise at every step
            output_type="pt",
            **self.settings,
        ).images
        self._check_finite(prompts, seeds)
        pixels = (output.float() * 255).round().clamp(0, 255).to(torch.uint8)
        return np.asarray(pixels.permute(0, 2, 3, 1).cpu())

    def _note_finite(self, _: Any, __: Any, decoded: Tensor) -> None:
        """Note which images the VAE decodes to finite numbers, before the pipeline clamps them."""
        self._finite.append(decoded.isfinite().flatten(1).all(1))

    def _check_finite(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        finite = torch.cat(self._finite).tolist()
        if all(finite):
            return
        first, dtype = finite.index(False), str(self.denoiser.dtype).removeprefix("torch.")
        remedy = "its weights are damaged, or its scheduler does not fit them"
        if dtype != "float32":
            others = "bf16 or fp32" if dtype == "float16" else "fp32"
            remedy = f"{dtype} may overflow: set evaluate.dtype={others}"
        raise SamplesError(
            f"model {self.model!r}: the image of {prompts[first]!r} (seed {seeds[first]}) has "
            f"values that are not finite, and no file was written; {remedy}"
        )


def latent_shape(pipeline: Any, resolution: int) -> tuple[int, int, int]:
    """Channels, height and width of a pipeline's latents.

    Raises:
        ValueError: The resolution does not suit the model.
    """
    family, config = family_of_pipeline(pipeline), getattr(pipeline, denoiser_of(pipeline)).config
    side = resolution // pipeline.vae_scale_factor
    if family is None:
        return config.in_channels, side, side
    files = ModelConfig(index={}, denoiser=config, vae=pipeline.vae.config, scheduler={})
    family.check_resolution("model.resolution", resolution, files)
    return family.latent_channels(files), side, side


def _scheduler_for(pipeline: Any, model: Model, scheduler: Scheduler) -> Any:
    """The scheduler to sample with, for a forward process that it fits."""
    own = pipeline.scheduler
    entry = ("diffusers", type(own).__name__)
    index = {"_class_name": type(pipeline).__name__, "scheduler": entry}
    check_process(model, scheduler, index=index, own=own.config, vae=pipeline.vae.config)
    says = {"prediction_type": model.prediction_type.value} if model.prediction_type else {}
    if scheduler is Scheduler.ddim and process_kind(index, own.config)[0] is not ProcessKind.flow:
        return deterministic(own, **says)
    return type(own).from_config(own.config, **says) if says else own


def deterministic(scheduler: Any, **settings: str) -> DDIMScheduler:
    """DDIM on another scheduler's noise schedule, without its clipping of pixel-space models."""
    return DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, thresholding=False, **settings
    )


def sample_missing(
    source: SamplesImages, samples: Sequence[Sample], batch: int, advance: Callable[[int], None]
) -> None:
    """Sample the images without a file and write each whole; `advance` gets the number added.

    When the device runs out of memory, the batch is halved for the rest of the call.

    Raises:
        SamplesError: The device has not enough memory for a single image.
    """
    left = missing(samples)
    while left:
        part = missing(left[:batch])  # another process may have sampled some by now
        pixels = _attempt(source, part) if part else np.empty(0)
        if pixels is None:
            if batch == 1:
                raise SamplesError(
                    f"not enough device memory to sample one image of {part[0].model!r}; lower "
                    "model.resolution, or set dtype=bf16"
                )
            batch = max(1, min(batch, len(part)) // 2)
            continue
        for sample, image in zip(part, pixels, strict=True):
            write_bytes(sample.path, encode_png(image))
        left = left[batch:]
        advance(len(part))


def _attempt(source: SamplesImages, samples: Sequence[Sample]) -> np.ndarray | None:
    """The images, or None when the device has not enough memory for them."""
    try:
        return source.sample([s.prompt.text for s in samples], [s.seed for s in samples])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # the cache is emptied outside, when the failed batch's tensors are gone
    torch.cuda.empty_cache()
    return None
