"""Images to a VAE's latents and back, the same for each class of VAE."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def encode_moments(
    vae: Any, images: Float[Tensor, "image 3 height width"]
) -> Float[Tensor, "image 2 channel height_8 width_8"]:
    """Mean and standard deviation of the posterior of images in [-1, 1], unscaled.

    The deviation of an autoencoder without a posterior is 0. One of videos takes each image as a
    video of one frame.
    """
    if is_of_videos(vae):
        posterior = vae.encode(images.unsqueeze(2)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1).squeeze(3)
    encoded = vae.encode(images)
    if not hasattr(encoded, "latent_dist"):
        return torch.stack([encoded.latent, torch.zeros_like(encoded.latent)], 1)
    posterior = encoded.latent_dist
    return torch.stack([posterior.mean, posterior.std], 1)


def decode_latents(
    vae: Any, latents: Float[Tensor, "image channel height_8 width_8"]
) -> Float[Tensor, "image 3 height width"]:
    """Images in about [-1, 1] of unscaled latents."""
    if is_of_videos(vae):
        latents = latents.unsqueeze(2)
    images: Tensor = vae.decode(latents)[0]
    return images.squeeze(2) if is_of_videos(vae) else images


def is_of_videos(vae: Any) -> bool:
    """Whether the third dimension of its images and latents is time."""
    return hasattr(vae, "temperal_downsample")


def encode_tiles(vae: Any, tile: int, factor: int) -> None:
    """Let a VAE encode and decode squares of `tile` pixels that overlap by a quarter."""
    if hasattr(vae, "tile_sample_stride_height"):
        sides = (f"{side}_{axis}" for side in ("min", "stride") for axis in ("height", "width"))
        sizes = (tile, tile, tile * 3 // 4, tile * 3 // 4)
        vae.enable_tiling(
            **{f"tile_sample_{one}": size for one, size in zip(sides, sizes, strict=True)}
        )
        return
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
