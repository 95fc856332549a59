"""Samples images with any diffusers model, from noise that depends on (prompt, seed) alone.

So every model starts from the same noise, and no image depends on the batch it is sampled in, on
the number of processes, or on what was sampled before.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers.utils import logging as transformers_logging

from data.artifacts.atomic import write_bytes
from data.devices import Dtype, is_out_of_memory
from data.images import Size, encode_png
from data.models.forward_process import DiscreteProcess
from generate.config import Scheduler
from generate.image_files import Model, Sample, SamplesError, missing
from generate.model_process import check_folder, check_process
from generate.pipelines import (
    denoiser_of,
    family_of_pipeline,
    keep_latents_in_fp32,
    latent_shape,
    load_pipeline,
)

T = TypeVar("T")

WRITERS = 4
"""Threads that encode images; zlib, which takes most of the time, releases the GIL."""
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
        size: Size,
        steps: int,
        guidance: float,
        section: str = "evaluate",
        offload: bool = False,
    ) -> None:
        """`model` names it in messages, `section` the settings to change.

        `offload` keeps only the part on the device that is running.
        """
        self.pipeline, self.model, self.section = pipeline, model, section
        self.device, self.denoiser = device, denoiser_of(pipeline)
        if offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        self._finite: list[Tensor] = []
        keep_latents_in_fp32(pipeline)
        pipeline.vae.decoder.register_forward_hook(self._note_finite)
        self.pipeline.set_progress_bar_config(disable=True)
        self.settings = {
            "height": size.height,
            "width": size.width,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
        }
        self.family = family_of_pipeline(pipeline)
        self.size = size
        self.shape = latent_shape(pipeline, size)
        if max(size.width, size.height) >= SLICED_ABOVE:
            pipeline.vae.enable_slicing()

    @classmethod
    def load(
        cls,
        model: Model,
        device: torch.device,
        *,
        scheduler: Scheduler,
        dtype: Dtype,
        size: Size,
        steps: int,
        guidance: float,
        section: str = "evaluate",
        offload: bool = False,
    ) -> "ImageGenerator":
        """Read a model's folder (safetensors only, no code from it).

        Raises:
            ValueError: A part of the folder is damaged or missing, it holds no pipeline that can
                be sampled, the scheduler does not fit its forward process, or the LoRA weights
                are not for it.
        """
        if offload and device.type != "cuda":
            raise SamplesError(
                f"{section}.cpu_offload=true moves parts of a model between a GPU and the CPU, but "
                f"the device is {device}; set it to false"
            )
        check_folder(model, scheduler, steps, size, section)
        for library in (logging, transformers_logging):
            library.disable_progress_bar()
            library.set_verbosity_error()  # else every truncated prompt gives a warning
        pipeline = load_pipeline(model, dtype)
        if getattr(pipeline, "watermark", None) is not None:
            pipeline.watermark = None  # SDXL's, where its library is installed; it changes pixels
        pipeline.scheduler = _scheduler_for(pipeline, model, scheduler, section)
        return cls(
            pipeline,
            device,
            model=model.name,
            size=size,
            steps=steps,
            guidance=guidance,
            section=section,
            offload=offload,
        )

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> UInt8[np.ndarray, "image height width 3"]:
        """One image for each prompt and seed.

        Raises:
            SamplesError: An image is not finite, as of an overflow in half precision.
        """
        pixels, finite = self.sample_with_flags(prompts, seeds)
        if not all(finite):
            first = finite.index(False)
            raise SamplesError(
                f"model {self.model!r}: the image of {prompts[first]!r} (seed {seeds[first]}) has "
                f"values that are not finite, and no file was written; {self.remedy}"
            )
        return pixels

    @torch.inference_mode()
    def sample_with_flags(
        self, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
    ) -> tuple[UInt8[np.ndarray, "image height width 3"], list[bool]]:
        """One image for each prompt and seed, and which of them are finite.

        `settings` of the pipeline replace those of the generator.
        """
        self._finite.clear()
        noise, options = initial_noise(prompts, seeds, self.shape), self.settings | settings
        if self.family is not None:
            noise = self.family.pipeline_latents(noise)
            guidance = options.pop("guidance_scale")
            options |= self.family.pipeline_options(len(prompts), guidance)
        steps = [generator(p, s, "steps") for p, s in zip(prompts, seeds, strict=True)]
        output = self.pipeline(
            prompt=list(prompts),
            latents=noise.to(self.device),
            generator=steps,  # for schedulers that add noise at every step
            output_type="pt",
            **options,
        ).images
        pixels = (output.float() * 255).round().clamp(0, 255).to(torch.uint8)
        finite: list[bool] = torch.cat(self._finite).tolist()
        return np.asarray(pixels.permute(0, 2, 3, 1).cpu()), finite

    def _note_finite(self, _: Any, __: Any, decoded: Tensor) -> None:
        """Note which images the VAE decodes to finite numbers, before the pipeline clamps them."""
        self._finite.append(decoded.isfinite().flatten(1).all(1))

    @property
    def remedy(self) -> str:
        """What to do about images that are not finite."""
        dtype = str(self.denoiser.dtype).removeprefix("torch.")
        if dtype == "float32":
            return "its weights are damaged, or its scheduler does not fit them"
        others = "bf16 or fp32" if dtype == "float16" else "fp32"
        return f"{dtype} may overflow: set {self.section}.dtype={others}"


def _scheduler_for(pipeline: Any, model: Model, scheduler: Scheduler, section: str) -> Any:
    """The scheduler to sample with, for a forward process that it fits."""
    own = pipeline.scheduler
    entry = ("diffusers", type(own).__name__)
    index = {"_class_name": type(pipeline).__name__, "scheduler": entry}
    process = check_process(
        model, scheduler, index=index, own=own.config, vae=pipeline.vae.config, section=section
    )
    says = {"prediction_type": model.prediction_type.value} if model.prediction_type else {}
    if scheduler is Scheduler.ddim and isinstance(process, DiscreteProcess):
        return deterministic(own, **says, **process.spacing_to_set(own.config))
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
    with ImageWriter() as writer:
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
            if part:
                writer.write(part, pixels)
            left = left[batch:]
            advance(len(part))


class ImageWriter:
    """Encodes and writes images in threads while the device samples the next batch."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(WRITERS, "png")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown()
        if kind is None:
            self._wait()

    def write(
        self, samples: Sequence[Sample], pixels: UInt8[np.ndarray, "image height width 3"]
    ) -> None:
        """Begin to write a batch, when the one before is on disk.

        Raises:
            ShardError: An image of the batch before could not be written.
        """
        self._wait()
        self._pending = [
            self._threads.submit(write_image, sample, image)
            for sample, image in zip(samples, pixels, strict=True)
        ]

    def _wait(self) -> None:
        for pending in self._pending:
            pending.result()


def write_image(sample: Sample, image: UInt8[np.ndarray, "height width 3"]) -> None:
    """Write an image whole or not at all."""
    write_bytes(sample.path, encode_png(image))


def _attempt(source: SamplesImages, samples: Sequence[Sample]) -> np.ndarray | None:
    """The images, or None when the device has not enough memory for them."""
    prompts, seeds = [s.prompt.text for s in samples], [s.seed for s in samples]
    return unless_out_of_memory(lambda: source.sample(prompts, seeds))


def unless_out_of_memory(sample: Callable[[], T]) -> T | None:
    """What `sample` returns, or None when the device has not enough memory for it."""
    try:
        return sample()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # the cache is emptied outside, when the failed batch's tensors are gone
    torch.cuda.empty_cache()
    return None
