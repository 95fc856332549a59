"""The forward process: noise on latents by timestep, and what the denoiser should predict.

Which process a model has is decided in `data/models/forward_process.py` and `rectified_flow.py`.
`ForwardProcess` is what the step and the sample sheets need of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from data.models.forward_process import Prediction

Latents = Float[Tensor, "image channel height width"]
"""Latents, noise or velocities of images, scaled as the denoiser expects."""
Timesteps = Int[Tensor, " image"]
"""A timestep for each image, 0 being the cleanest."""


@runtime_checkable
class ForwardProcess(Protocol):
    """Noise on latents, the denoiser's target, and the way back."""

    @property
    def num_timesteps(self) -> int:
        """Timesteps; the last is the noisiest."""
        ...

    def add_noise(self, latents: Latents, noise: Latents, timestep: Timesteps) -> Latents:
        """The latents with the noise of these timesteps."""
        ...

    def get_target(self, latents: Latents, noise: Latents, timestep: Timesteps) -> Latents:
        """What the denoiser should say."""
        ...

    def denoiser_timestep(self, timestep: Timesteps) -> Shaped[Tensor, " image"]:
        """What the denoiser is told of a timestep."""
        ...

    def descent(self, steps: int) -> Iterator[tuple[int | float, int | float]]:
        """(From, to) of each step of sampling, from pure noise down, as the denoiser is told."""
        ...

    def step_back(
        self, noisy: Latents, predicted: Latents, timestep: int | float, before: int | float
    ) -> Latents:
        """A deterministic step of sampling, from one of `descent` to the next."""
        ...


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """A discrete process: how much signal is left at each timestep."""

    alphas_cumprod: Float[Tensor, " timestep"]
    """alpha_bar of Ho et al. 2020, float32, falling from nearly 1 towards 0.

    The last may be exactly 0, for denoisers that predict v (Lin et al. 2024)."""
    prediction: Prediction

    @property
    def num_timesteps(self) -> int:
        """Timesteps; the last is the noisiest."""
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Latents, noise: Latents, timestep: Timesteps) -> Latents:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, Eq. 4)."""
        signal, spread = self._scales(timestep)
        return signal * latents + spread * noise

    def get_target(self, latents: Latents, noise: Latents, timestep: Timesteps) -> Latents:
        """What the denoiser should say: the noise, or the velocity."""
        if self.prediction is Prediction.epsilon:
            return noise
        signal, spread = self._scales(timestep)
        return signal * noise - spread * latents

    def denoiser_timestep(self, timestep: Timesteps) -> Timesteps:
        """The timestep itself."""
        return timestep

    def descent(self, steps: int) -> Iterator[tuple[int, int]]:
        """(From, to) of each step, evenly from the noisiest timestep down to 0."""
        stops = np.linspace(self.num_timesteps - 1, 0, steps + 1).round().astype(int).tolist()
        return zip(stops, stops[1:], strict=False)

    def step_back(
        self, noisy: Latents, predicted: Latents, timestep: int | float, before: int | float
    ) -> Latents:
        """A DDIM step from one timestep to an earlier one (Song et al. 2021, Eq. 12, sigma 0).

        The earliest, and what lies before it, is `before` = 0. Only epsilon divides by the signal,
        which `forward_process` therefore requires to be left.
        """
        kept, kept_before = (self.alphas_cumprod[int(at)] for at in (timestep, before))
        signal, spread = kept.sqrt(), (1 - kept).sqrt()
        if self.prediction is Prediction.epsilon:
            latents, noise = (noisy - spread * predicted) / signal, predicted
        else:
            latents = signal * noisy - spread * predicted
            noise = signal * predicted + spread * noisy
        return kept_before.sqrt() * latents + (1 - kept_before).sqrt() * noise

    def _scales(self, timestep: Timesteps) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()


@dataclass(frozen=True, slots=True)
class RectifiedFlow:
    """Straight paths from latents to noise; the denoiser predicts their direction."""

    sigmas: Float[Tensor, " timestep"]
    """The fraction of noise at each timestep, float32, rising to 1."""
    sampling_shift: float = 1.0
    """The shift of sampling; that of training is in `sigmas`."""
    terminal: float | None = None
    """The sigma of the last step of sampling, to which the others are stretched."""

    @property
    def num_timesteps(self) -> int:
        """Timesteps; the last is pure noise."""
        return len(self.sigmas)

    def add_noise(self, latents: Latents, noise: Latents, timestep: Timesteps) -> Latents:
        """x_s = (1 - sigma) x_0 + sigma noise (Esser et al. 2024, Eq. 13)."""
        sigma = self.sigmas[timestep].view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def get_target(self, latents: Latents, noise: Latents, timestep: Timesteps) -> Latents:
        """The velocity, noise - x_0, at any timestep."""
        return noise - latents

    def denoiser_timestep(self, timestep: Timesteps) -> Float[Tensor, " image"]:
        """Sigma times the number of timesteps, which a shift makes another than the timestep."""
        return self.sigmas[timestep] * self.num_timesteps

    def descent(self, steps: int) -> Iterator[tuple[float, float]]:
        """(From, to) of each step, as the denoiser is told: sigmas evenly from 1 to 0, shifted.

        With a `terminal` the signal 1 - sigma of all but the 0 is then scaled, so that the last
        step begins there (`shift_terminal` of diffusers' scheduler).
        """
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigmas = shifted(even, self.sampling_shift)
        if self.terminal is not None and steps > 1:
            signal = 1 - sigmas[:-1]
            sigmas[:-1] = 1 - signal * (1 - self.terminal) / signal[-1]
        stops = (sigmas * self.num_timesteps).tolist()
        return zip(stops, stops[1:], strict=False)

    def step_back(
        self, noisy: Latents, predicted: Latents, timestep: int | float, before: int | float
    ) -> Latents:
        """An Euler step along the velocity, as DDIM is for this process."""
        return noisy + (before - timestep) / self.num_timesteps * predicted


def shifted(sigma: Float[Tensor, " timestep"], shift: float) -> Float[Tensor, " timestep"]:
    """Sigmas moved towards noise by a shift above 1: s sigma / (1 + (s - 1) sigma).

    Esser et al. 2024, Eq. 23, with s the root of the resolutions' ratio.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def rectified_flow(
    num_timesteps: int,
    shift: float,
    sampling_shift: float,
    device: torch.device,
    terminal: float | None = None,
) -> RectifiedFlow:
    """The grid of sigmas of diffusers' training scripts: 1/n ... 1, shifted once."""
    even = torch.arange(1, num_timesteps + 1, dtype=torch.float32) / num_timesteps
    return RectifiedFlow(shifted(even, shift).to(device), sampling_shift, terminal)
