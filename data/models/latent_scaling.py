"""Applies a model's scaling to latents: from the VAE's numbers to the denoiser's, and back."""

from jaxtyping import Float
from torch import Tensor

from data.models.latent_scale import LatentScale


def scale_latents(
    latents: Float[Tensor, "image channel height width"], scale: LatentScale
) -> Float[Tensor, "image channel height width"]:
    """What the VAE encodes -> what the denoiser sees."""
    if scale.mean is None or scale.std is None:
        return (latents - scale.shift) * scale.factor if scale.shift else latents * scale.factor
    return (latents - _channels(scale.mean, latents)) * scale.factor / _channels(scale.std, latents)


def unscale_latents(
    latents: Float[Tensor, "image channel height width"], scale: LatentScale
) -> Float[Tensor, "image channel height width"]:
    """What the denoiser sees -> what the VAE decodes."""
    if scale.mean is None or scale.std is None:
        return latents / scale.factor + scale.shift if scale.shift else latents / scale.factor
    return latents * _channels(scale.std, latents) / scale.factor + _channels(scale.mean, latents)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1)
