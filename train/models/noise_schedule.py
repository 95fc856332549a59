"""The forward process: noise on latents by timestep, and what the denoiser should predict."""

from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float, Int
from torch import Tensor


class Prediction(Enum):
    """What a denoiser was trained to predict; named as diffusers' schedulers name it."""

    EPSILON = "epsilon"
    """The noise."""
    VELOCITY = "v_prediction"
    """alpha noise - sigma latents (Salimans and Ho 2022)."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The forward process: how much signal is left at each timestep."""

    alphas_cumprod: Float[Tensor, " timestep"]
    """alpha_bar of Ho et al. 2020, float32, falling from nearly 1 towards 0."""
    prediction: Prediction

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
        if self.prediction is Prediction.EPSILON:
            return noise
        signal, spread = self._scales(timestep)
        return signal * noise - spread * latents

    def ddim_step(
        self,
        noisy: Float[Tensor, "image channel height width"],
        predicted: Float[Tensor, "image channel height width"],
        timestep: int,
        before: int,
    ) -> Float[Tensor, "image channel height width"]:
        """A DDIM step from one timestep to an earlier one (Song et al. 2021, Eq. 12, sigma 0).

        The earliest, and what lies before it, is `before` = 0.
        """
        kept, kept_before = self.alphas_cumprod[timestep], self.alphas_cumprod[before]
        signal, spread = kept.sqrt(), (1 - kept).sqrt()
        if self.prediction is Prediction.EPSILON:
            latents, noise = (noisy - spread * predicted) / signal, predicted
        else:
            latents = signal * noisy - spread * predicted
            noise = signal * predicted + spread * noisy
        return kept_before.sqrt() * latents + (1 - kept_before).sqrt() * noise

    def _scales(self, timestep: Int[Tensor, " image"]) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()
