"""A model's VAE as stage one needs it to write latents, known without loading it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.atomic import sha256_of
from data.artifacts.readable import check_readable, read_json_object
from data.families import find_family
from data.models.vae_config import check_vae_config, has_posterior, latent_channels, latent_factor

VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, slots=True)
class Vae:
    """A model's VAE, known without loading it."""

    sha256: str
    """SHA-256 of its weights, which names it."""
    channels: int
    """Channels of a latent."""
    factor: int
    """Pixels of an image beside one of its latent."""
    force_upcast: bool
    """Whether its activations overflow in fp16 (SDXL's), so that it must run in fp32."""
    has_posterior: bool
    """Whether latents have a standard deviation."""


def find_vae(model: Path, fingerprint: Callable[[Path], str] = sha256_of) -> Vae:
    """The VAE of a diffusers folder.

    Raises:
        ValueError: There is none, or its weights are not in safetensors.
    """
    config, weights = model / "vae" / "config.json", model / VAE_WEIGHTS
    if not (config.is_file() and weights.is_file()):
        lacks = config if not config.is_file() else weights
        raise ValueError(f"model.path={model} has no VAE to make latents with: no {lacks}")
    value = read_json_object(config, f"model.path={model}")
    check_readable(weights, f"model.path={model}")
    check_vae_config(value, f"model.path={model}: {config}")
    family = find_family(_index(model))
    return Vae(
        sha256=fingerprint(weights),
        channels=latent_channels(value),
        factor=latent_factor(value),
        # Without a family nobody knows; fp32 is safe.
        force_upcast=family.vae_in_fp32(value) if family else bool(value.get("force_upcast", True)),
        has_posterior=has_posterior(value),
    )


def _index(model: Path) -> dict[str, Any]:
    path = model / "model_index.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"model.path={model}: {path} cannot be read ({error})") from error
    return value if isinstance(value, dict) else {}


def latent_shape(vae: Vae, size: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of square images.

    Raises:
        ValueError: The size is no multiple of the VAE's factor.
    """
    if size % vae.factor:
        raise ValueError(
            f"model.resolution={size} is no multiple of {vae.factor}, the VAE's factor"
        )
    return vae.channels, size // vae.factor, size // vae.factor
