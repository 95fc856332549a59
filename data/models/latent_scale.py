"""How a VAE's latents are scaled before a denoiser sees them, by the VAE's `config.json`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIG = "vae/config.json"
SHIFT, NORMALISATION = "shift_factor", "latents_mean"
"""What a pipeline applies besides the factor, if anything; the rest it ignores."""


class LatentScaleError(ValueError):
    """A VAE's scaling is not one that the model's own pipeline applies."""


@dataclass(frozen=True, slots=True)
class LatentScale:
    """Latents are (VAE's latents - shift - mean) factor / std, the last two channel by channel."""

    factor: float
    """`scaling_factor`."""
    mean: tuple[float, ...] | None = None
    """`latents_mean`; None is 0."""
    std: tuple[float, ...] | None = None
    """`latents_std`; None is 1."""
    shift: float = 0.0
    """`shift_factor`."""


def latent_scale(
    what: str,
    pipeline: str,
    vae: Mapping[str, Any],
    applies: str | None = None,
    *,
    required: bool = False,
) -> LatentScale:
    """The scaling of a model, of which `vae` is the VAE's `config.json`.

    `what` names the model in messages, `pipeline` is the class in its `model_index.json`, and
    `applies` what that applies besides the factor; `required` means that it cannot do without.

    Raises:
        LatentScaleError: A value is no number, or the model's pipeline would ignore it.
    """
    factor = vae.get("scaling_factor", 0.18215)  # diffusers' default
    if not (_are_numbers([factor]) and factor > 0):
        raise _refuse(what, "scaling_factor", factor, "a number above 0")
    shift = vae.get("shift_factor")
    if applies == SHIFT and not _are_numbers([shift]):
        raise _refuse(what, "shift_factor", shift, f"a number, which {pipeline} adds")
    if shift and applies != SHIFT:
        raise _ignored(what, "shift_factor", shift, pipeline)
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if mean is None and std is None:
        if required:
            raise _refuse(what, "latents_mean", None, f"a list of numbers, which {pipeline} needs")
        return LatentScale(float(factor), shift=float(shift or 0))
    if applies != NORMALISATION:
        name = "latents_std" if mean is None else "latents_mean"
        raise _ignored(what, name, vae[name], pipeline)
    channels = vae.get("latent_channels", 4)
    return LatentScale(
        float(factor),
        _per_channel(what, "latents_mean", mean, channels),
        _per_channel(what, "latents_std", std, channels, above=0.0),
    )


def _per_channel(
    what: str, name: str, values: Any, channels: int, above: float = -math.inf
) -> tuple[float, ...]:
    is_list = isinstance(values, list | tuple) and len(values) == channels
    if not (is_list and _are_numbers(values) and min(values) > above):
        bound = "" if above == -math.inf else f" above {above:g}"
        allowed = f"a list of {channels} numbers{bound}; mean and std go together, or both are null"
        raise _refuse(what, name, values, allowed)
    return tuple(float(value) for value in values)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )


def _refuse(what: str, name: str, value: Any, allowed: str) -> LatentScaleError:
    return LatentScaleError(
        f"{what}: {CONFIG} has {name}={value!r}; allowed: {allowed}. Restore the file that the "
        "model came with"
    )


def _ignored(what: str, name: str, value: Any, pipeline: str) -> LatentScaleError:
    return LatentScaleError(
        f"{what}: {CONFIG} has {name}={value!r}, which {pipeline} ignores when it decodes, so that "
        f"its images would be wrong; allowed is null. Take the VAE that the model was trained with"
    )
