"""The forward process: noise on latents by timestep, and what the denoiser should predict.

Which process a model has is decided in `data/models/forward_process.py`. `ForwardProcess` is what
the step and the sample sheets need of one; flow matching would be another class with its methods.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from data.models.forward_process import Prediction


@runtime_checkable
class ForwardProcess(Protocol):
    """Noise on latents, the denoiser's target, and the way back."""

    @property
    def num_timesteps(self) -> int:
        """Timesteps; the last is the noisiest."""
        ...

    def add_noise(
        self,
        latents: Float[Tensor, "image channel height width"],
        noise: Float[Tensor, "image channel height width"],
        timestep: Int[Tensor, " image"],
    ) -> Float[Tensor, "image channel height width"]:
        """The latents with the noise of these timesteps."""
        ...

    def get_target(
        self,
        latents: Float[Tensor, "image channel height width"],
        noise: Float[Tensor, "image channel height width"],
        timestep: Int[Tensor, " image"],
    ) -> Float[Tensor, "image channel height width"]:
        """What the denoiser should say."""
        ...

    def step_back(
        self,
        noisy: Float[Tensor, "image channel height width"],
        predicted: Float[Tensor, "image channel height width"],
        timestep: int,
        before: int,
    ) -> Float[Tensor, "image channel height width"]:
        """A deterministic step from one timestep to an earlier one."""
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

    def add_noise(
        self,
        latents: Float[Tensor, "image channel height width"],
        noise: Float[Tensor, "image channel height width"],
        timestep: Int[Tensor, " image"],
    ) -> Float[Tensor, "image channel height width"]:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, Eq. 4)."""
        signal, spread = self._scales(timestep)
        return signal * latents + spread * noise

    def get_target(
        self,
        latents: Float[Tensor, "image channel height width"],
        noise: Float[Tensor, "image channel height width"],
        timestep: Int[Tensor, " image"],
    ) -> Float[Tensor, "image channel height width"]:
        """What the denoiser should say: the noise, or the velocity."""
        if self.prediction is Prediction.epsilon:
            return noise
        signal, spread = self._scales(timestep)
        return signal * noise - spread * latents

    def step_back(
        self,
        noisy: Float[Tensor, "image channel height width"],
        predicted: Float[Tensor, "image channel height width"],
        timestep: int,
        before: int,
    ) -> Float[Tensor, "image channel height width"]:
        """A DDIM step from one timestep to an earlier one (Song et al. 2021, Eq. 12, sigma 0).

        The earliest, and what lies before it, is `before` = 0. Only epsilon divides by the signal,
        which `forward_process` therefore requires to be left.
        """
        kept, kept_before = self.alphas_cumprod[timestep], self.alphas_cumprod[before]
        signal, spread = kept.sqrt(), (1 - kept).sqrt()
        if self.prediction is Prediction.epsilon:
            latents, noise = (noisy - spread * predicted) / signal, predicted
        else:
            latents = signal * noisy - spread * predicted
            noise = signal * predicted + spread * noisy
        return kept_before.sqrt() * latents + (1 - kept_before).sqrt() * noise

    def _scales(self, timestep: Int[Tensor, " image"]) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()
