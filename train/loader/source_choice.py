"""Chooses what a run trains on: the images in the pair files, or their latents from stage one.

It does not import torch, so a finished run answers at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.atomic import ShardError
from data.artifacts.latents import LatentSet, read_set, set_name
from data.families.vae import find_vae
from train.config import LatentUse

FROM_FILES = "images: from the pair files, encoded by the VAE in every step"
GUIDE = "docs/latents.md"


@dataclass(frozen=True, slots=True)
class LatentsNeeded:
    """What latents must match to be read instead of a run's images."""

    folder: Path
    """The folder of latents, `runs/<run>/latents`."""
    model: Path
    """The model's folder; its VAE's weights name the set."""
    resolution: int
    """Pixels of the square images."""
    flip: bool
    """Whether images are mirrored."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where a run's images come from."""

    latents: LatentSet | None
    """The set to read; None reads the pair files."""
    description: str
    """A line for the terminal, with the reason."""

    @property
    def settings(self) -> dict[str, Any] | None:
        """What of it decides the weights, as JSON."""
        if self.latents is None:
            return None
        form = self.latents.form
        identity = self.latents.manifest.identity
        return {"identity": identity, "dtype": form.dtype, "moments": form.moments}


def choose_source(
    use: LatentUse, need: LatentsNeeded, begun: Mapping[str, Any] | None
) -> ImageSource:
    """Choose the images of a run; `begun` are the settings with which it was begun, if it was.

    A resumed run keeps what it began with.

    Raises:
        ShardError: Latents are required, or were used so far, and none match; says why.
    """
    if use is LatentUse.never:
        return ImageSource(None, f"{FROM_FILES} (train.latents=never)")
    if use is LatentUse.auto and begun is not None and begun.get("latents") is None:
        return ImageSource(None, f"{FROM_FILES}, as this run began")
    latents = find_latents(need)
    if isinstance(latents, LatentSet):
        return ImageSource(latents, f"images: latents in {latents.folder} ({latents.form})")
    if use is LatentUse.always or begun is not None:
        reason = "train.latents=always" if begun is None else "this run began with latents"
        raise ShardError(f"{reason}, but {latents}; `make labels ARGS=latents=model` writes them")
    return ImageSource(None, f"{FROM_FILES}: {latents}")


def advice(steps: int, batch: int, pairs: int) -> str:
    """Say what latents would save a run that reads the pair files; empty if nothing."""
    times = steps * batch / pairs
    if times <= 1:
        return ""
    return (
        f"each image is decoded and encoded {times:.1f} times in this run; with latents=model in "
        f"`make labels` it would be once ({GUIDE})"
    )


def find_latents(need: LatentsNeeded) -> LatentSet | str:
    """Return the complete set that matches, or the reason why there is none."""
    sets = sorted(path.name for path in need.folder.glob("*-*") if path.is_dir())
    if not sets:
        return f"there are no latents in {need.folder}"
    name = set_name(find_vae(need.model).sha256, need.resolution)
    if name not in sets:
        return f"{need.folder} has {', '.join(sets)}, but this VAE and resolution are {name}"
    latents = read_set(need.folder / name)
    if latents is None:
        return f"the latents in {need.folder / name} are not complete"
    if need.flip and not latents.form.flip:
        return (
            f"train.flip=true mirrors images, and {latents.folder} has no mirrored ones (it was "
            "written with label.latents.flip=false)"
        )
    return latents
