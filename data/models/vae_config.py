"""What a VAE's `config.json` says of its latents' shape; nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.artifacts.readable import UnreadableError


@dataclass(frozen=True, slots=True)
class _Names:
    """How a class of diffusers calls what decides the shape of its latents, and its defaults."""

    channels: str
    usual_channels: int
    levels: str
    usual_levels: int
    halvings: int
    """Halvings of the image's sides beyond the number of levels."""
    is_random: bool = True
    """Whether an image has a distribution of latents."""


KINDS = {
    "AutoencoderKL": _Names("latent_channels", 4, "block_out_channels", 1, -1),
    "AutoencoderDC": _Names(
        "latent_channels", 32, "encoder_block_out_channels", 6, -1, is_random=False
    ),
    "AutoencoderKLQwenImage": _Names("z_dim", 16, "temperal_downsample", 3, 0),
}
"""The classes whose latents can be trained on."""
USUAL = "AutoencoderKL"
"""The class of a file that names none."""


def check_vae_config(vae: Mapping[str, Any], where: str) -> None:
    """Refuse a VAE of which no latents can be made; messages begin with `where`, its file.

    Raises:
        UnreadableError: Its class is not known here, or a value is no list or number.
    """
    kind = vae.get("_class_name", USUAL)
    if kind not in KINDS:
        raise UnreadableError(
            f"{where} describes a VAE of the class {kind}; allowed are {', '.join(KINDS)}"
        )
    names = KINDS[kind]
    levels, channels = vae.get(names.levels, []), vae.get(names.channels, names.usual_channels)
    if not isinstance(levels, list) or type(channels) is not int or channels < 1:
        raise UnreadableError(
            f"{where} has {names.levels}={levels!r} and {names.channels}={channels!r}; needed are "
            "a list and a number"
        )


def latent_channels(vae: Mapping[str, Any]) -> int:
    """Channels of a latent."""
    names = _names(vae)
    return int(vae.get(names.channels, names.usual_channels))


def latent_factor(vae: Mapping[str, Any]) -> int:
    """Pixels of an image's side for one of its latents."""
    names = _names(vae)
    levels = len(vae[names.levels]) if names.levels in vae else names.usual_levels
    return int(2 ** (levels + names.halvings))


def has_posterior(vae: Mapping[str, Any]) -> bool:
    """Whether an image's latents have a standard deviation; else they are always the same."""
    return _names(vae).is_random


def _names(vae: Mapping[str, Any]) -> _Names:
    return KINDS[vae.get("_class_name", USUAL)]
