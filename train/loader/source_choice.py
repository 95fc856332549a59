"""Which images a run trains on: those of the pair files, or their latents from stage one.

Nothing here imports torch, so that a finished run answers at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.atomic import ShardError
from data.artifacts.latents import LatentSet, find_vae, read_set, set_name
from train.config import LatentUse

FROM_FILES = "images: from the pair files, encoded by the VAE in every step"
GUIDE = "docs/latents.md"


@dataclass(frozen=True, slots=True)
class LatentsNeeded:
    """What latents must be to stand for a run's images."""

    folder: Path
    """Where latents are kept, `runs/<run>/latents`."""
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
    words: str
    """Says so in the terminal, and why."""

    @property
    def settings(self) -> dict[str, Any] | None:
        """What decides the weights of it, as JSON."""
        if self.latents is None:
            return None
        form = self.latents.form
        identity = self.latents.manifest.identity
        return {"identity": identity, "dtype": form.dtype, "moments": form.moments}


def choose_source(
    use: LatentUse, need: LatentsNeeded, begun: Mapping[str, Any] | None
) -> ImageSource:
    """The images of a run; `begun` are its settings when it is under way.

    A run that is under way goes on with what it began with.

    Raises:
        ShardError: Latents are asked for, or were used so far, and none fit; says why.
    """
    if use is LatentUse.never:
        return ImageSource(None, f"{FROM_FILES} (train.latents=never)")
    if use is LatentUse.auto and begun is not None and begun.get("latents") is None:
        return ImageSource(None, f"{FROM_FILES}, as this run began")
    found = find_latents(need)
    if isinstance(found, LatentSet):
        return ImageSource(found, f"images: latents in {found.folder} ({found.form})")
    if use is LatentUse.always or begun is not None:
        asked = "train.latents=always" if begun is None else "this run began with latents"
        raise ShardError(f"{asked}, but {found}; `make labels ARGS=latents=model` writes them")
    return ImageSource(None, f"{FROM_FILES}: {found}")


def advice(steps: int, batch: int, pairs: int) -> str:
    """What latents would spare a run that reads the pair files; empty where that is nothing."""
    times = steps * batch / pairs
    if times <= 1:
        return ""
    return (
        f"each image is decoded and encoded {times:.1f} times in this run; with latents=model in "
        f"`make labels` it would be once ({GUIDE})"
    )


def find_latents(need: LatentsNeeded) -> LatentSet | str:
    """The complete set that fits, or why there is none."""
    there = sorted(path.name for path in need.folder.glob("*-*") if path.is_dir())
    if not there:
        return f"there are no latents in {need.folder}"
    name = set_name(find_vae(need.model).sha256, need.resolution)
    if name not in there:
        return f"{need.folder} has {', '.join(there)}, but this VAE and resolution are {name}"
    found = read_set(need.folder / name)
    if found is None:
        return f"the latents in {need.folder / name} are not complete"
    if need.flip and not found.form.flip:
        return (
            f"train.flip=true mirrors images, and {found.folder} has no mirrored ones (it was "
            "written with label.latents.flip=false)"
        )
    return found
