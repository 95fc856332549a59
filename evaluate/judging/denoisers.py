"""How differently two denoisers predict, on the base's images with noise added.

    d(s) = mean over images and latent values of (f(x_s, prompt) - f_base(x_s, prompt))^2

x_s are the latents of the base's images of the held-out prompts, as the base's VAE encodes them,
with the noise of level s; f is what the denoiser predicts: the noise (epsilon), v, or the velocity
of a flow-matching model. So d is in squared units of that, in which the added noise has variance 1.
Both models get the same x_s; each encodes the prompts itself. Timestep and noise of an image are a
function of (prompt, seed, level).
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.devices import to_device
from data.models.autoencoder import encode_moments
from data.models.family import Condition, Family, ModelConfig, Process
from data.models.forward_process import DiscreteProcess
from data.models.latent_scaling import scale_latents
from data.models.noise_schedule import ForwardProcess, NoiseSchedule, rectified_flow
from data.models.text_encoders import TextEncoder, encode_distinct
from evaluate.judging.scores import read_pixels
from generate.config import Scheduler
from generate.image_files import Model, Sample, SamplesError
from generate.model_process import check_process
from generate.pipelines import denoiser_of
from generate.sampler import ImageGenerator, generator, unless_out_of_memory

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels, as fractions of the schedule from least to most noise."""
SAME_LATENTS = 0.05
"""By which fraction of their size two VAEs' latents of an image may differ (bf16 rounds)."""


class NotComparableError(ValueError):
    """Two denoisers have no inputs in common; says why."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What all models are given."""

    samples: Sequence[Sample]
    """The base's images."""
    latents: Float[Tensor, "image channel height width"]
    """Of these images, on the CPU, scaled as the denoiser sees them."""

    def noise(self, level: int, part: slice) -> Float[Tensor, "image channel height width"]:
        """The noise of some images at a level."""
        shape, use = self.latents.shape[1:], f"distance/{level}"
        each = (generator(s.prompt.text, s.seed, use) for s in self.samples[part])
        return torch.stack([torch.randn(shape, generator=one) for one in each])


@dataclass(frozen=True, slots=True)
class Predictions:
    """A denoiser's predictions of `Inputs`, on the CPU."""

    values: Float[Tensor, "level image channel height width"]
    errors: Float[Tensor, "level image"]
    """Mean squared difference from what it should predict."""


class Probe:
    """A loaded model, of which the denoiser is asked."""

    def __init__(self, loaded: ImageGenerator, model: Model, scheduler: Scheduler) -> None:
        """`scheduler` is what the model is sampled with.

        Raises:
            NotComparableError: Its pipeline or forward process is only known to diffusers.
        """
        pipeline = loaded.pipeline
        self.model, self.pipeline, self.device = model, pipeline, loaded.device
        self.denoiser, self.dtype = loaded.denoiser, loaded.denoiser.dtype
        self.size, self.latent_shape = loaded.size, loaded.shape
        if loaded.family is None:
            raise NotComparableError(
                f"{model.name} is a {type(pipeline).__name__}, whose denoiser is only known to "
                "diffusers"
            )
        self.family: Family = loaded.family
        self.config = config_of(pipeline)
        process = check_process(
            model,
            scheduler,
            index=self.config.index,
            own=self.config.scheduler,
            vae=self.config.vae,
        )
        if process is None:
            raise NotComparableError(f"{model.name} has a forward process only known to diffusers")
        self.process: Process = process
        self.schedule = schedule_of(process, pipeline, self.device)

    def check_comparable(self, base: "Probe", inputs: Inputs) -> None:
        """Refuse a model that takes other latents, or predicts something else, than the base.

        Raises:
            NotComparableError: Says what differs.
        """
        what = f"{self.model.name} and {base.model.name}"
        if self.family is not base.family or self.latent_shape != base.latent_shape:
            raise NotComparableError(f"{what} are of different families or latents")
        if predicts(self.process) != predicts(base.process):
            raise NotComparableError(f"{what} have different forward processes or predictions")
        first = self.encode(inputs.samples[:1])
        difference = (first - inputs.latents[:1]).norm() / inputs.latents[:1].norm()
        if not difference < SAME_LATENTS:
            raise NotComparableError(f"{what} have different VAEs")

    @torch.inference_mode()
    def encode(self, samples: Sequence[Sample]) -> Float[Tensor, "image channel height width"]:
        """Encode images to latents, at the mode of the VAE's posterior, one by one."""
        vae = self.pipeline.vae.to(torch.float32)  # SDXL's overflows in fp16
        scale = self.family.latent_scale(self.model.name, self.config.vae)
        latents = []
        for sample in samples:
            signed = torch.tensor(read_pixels(sample.path)).permute(2, 0, 1)[None] / 127.5 - 1
            moments = encode_moments(vae, to_device(signed, self.device))
            latents.append(scale_latents(moments[:, 0].float(), scale).cpu())
        return torch.cat(latents)

    def predictions(self, inputs: Inputs, batch: int) -> Predictions:
        """Predict from all inputs, `batch` images at a time, or fewer where the memory ends.

        Raises:
            SamplesError: The device has not enough memory for a single image.
        """
        while True:
            predicted = unless_out_of_memory(partial(self._predictions, inputs, batch))
            if predicted is not None:
                return predicted
            if batch == 1:
                raise SamplesError(
                    f"not enough device memory to run the denoiser of {self.model.name!r} on one "
                    "image; set evaluate.dtype=bf16, or evaluate.distance_images=0"
                )
            batch //= 2

    def close(self) -> None:
        """Give the memory back; what the model is stays known."""
        self.pipeline = self.denoiser = None
        gc.collect()  # hooks and modules refer to each other
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _predictions(self, inputs: Inputs, batch: int) -> Predictions:
        starts = range(0, len(inputs.samples), batch)
        parts = [self._part(inputs, slice(start, start + batch)) for start in starts]
        values, errors = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return Predictions(values, errors)

    def _part(self, inputs: Inputs, part: slice) -> tuple[Tensor, Tensor]:
        """Predictions and errors of some images at all levels."""
        condition = self._condition([sample.prompt.text for sample in inputs.samples[part]])
        latents = to_device(inputs.latents[part], self.device)
        values, errors = [], []
        for index, level in enumerate(LEVELS):
            noise = to_device(inputs.noise(index, part), self.device)
            step = round(level * (self.schedule.num_timesteps - 1))
            timestep = torch.full((len(latents),), step, device=self.device)
            noisy = self.schedule.add_noise(latents, noise, timestep)
            at = self.schedule.denoiser_timestep(timestep)
            predicted = self.family.predict(self.denoiser, noisy.to(self.dtype), at, condition)
            target = self.schedule.get_target(latents, noise, timestep)
            values.append(predicted.float().cpu())
            errors.append((predicted.float() - target).square().flatten(1).mean(1).cpu())
        return torch.stack(values), torch.stack(errors)

    def _condition(self, prompts: Sequence[str]) -> Condition:
        """The condition of whole images of these prompts."""
        encoders = {
            part: TextEncoder(
                getattr(self.pipeline, part.replace("text_encoder", "tokenizer")), encoder
            )
            for part in self.family.text_encoders
            if (encoder := getattr(self.pipeline, part, None)) is not None
        }
        encode = partial(self.family.encode, encoders, config=self.config)
        text = encode_distinct(encode, prompts).to(self.device, self.dtype)
        size = torch.tensor([[self.size.height, self.size.width]] * len(prompts))
        guidance = self.family.guidance(self.config)
        condition = self.family.condition(text, size, self.size, guidance)
        if condition.added is None:
            return condition
        added = {name: to_device(value, self.device) for name, value in condition.added.items()}
        return replace(condition, added=added)


def config_of(pipeline: Any) -> ModelConfig:
    """The configuration of a loaded pipeline, as its folder has it."""
    parts = {
        name: list(value)
        for name, value in pipeline.config.items()
        if isinstance(value, tuple | list)
    }
    index: Mapping[str, Any] = parts | {
        "_class_name": type(pipeline).__name__,
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
    }
    return ModelConfig(
        index=index,
        denoiser=denoiser_of(pipeline).config,
        vae=pipeline.vae.config,
        scheduler=pipeline.scheduler.config,
    )


def schedule_of(process: Process, pipeline: Any, device: torch.device) -> ForwardProcess:
    """A model's noise by timestep; a flow's sigmas are even, without a shift."""
    if isinstance(process, DiscreteProcess):
        kept = pipeline.scheduler.alphas_cumprod.float()
        return NoiseSchedule(to_device(kept, device), process.prediction)
    return rectified_flow(process.num_timesteps, 1.0, 1.0, device)


def predicts(process: Process) -> str:
    """What a denoiser of a process predicts, by its name in diffusers; `velocity` of a flow."""
    return process.prediction.value if isinstance(process, DiscreteProcess) else "velocity"


def squared_differences(model: Predictions, base: Predictions) -> Float[np.ndarray, "level image"]:
    """The mean over an image's latent values of the squared difference."""
    squared = (model.values - base.values).square()
    return np.asarray(squared.flatten(2).mean(2, dtype=torch.float64))
