"""Chooses what a run trains on: images and prompts, or what stage one has encoded of them.

It does not import torch, so a finished run answers at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.artifacts import texts
from data.artifacts.atomic import ShardError
from data.artifacts.latents import LatentSet, read_set, set_name
from data.artifacts.texts import TextSet
from data.families.text import find_text
from data.families.vae import find_vae
from data.images import Size
from train.config import CacheUse

Set = TypeVar("Set", LatentSet, TextSet)
FROM_FILES = "images: from the pair files, encoded by the VAE in every step"
FROM_ENCODERS = "prompts: encoded in every step"
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
    buckets: tuple[Size, ...]
    """The sizes of images where they are several; else none."""
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


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where a run's encoded prompts come from."""

    texts: TextSet | None
    """The set to read; None encodes them."""
    description: str
    """A line for the terminal, with the reason."""

    @property
    def settings(self) -> dict[str, Any] | None:
        """What of it decides the weights, as JSON."""
        if self.texts is None:
            return None
        return {"identity": self.texts.manifest.identity, "dtype": self.texts.form.dtype}


def choose_source(
    use: CacheUse, need: LatentsNeeded, begun: Mapping[str, Any] | None
) -> ImageSource:
    """Choose the images of a run; `begun` are the settings with which it was begun, if it was.

    Raises:
        ShardError: Latents are required, or were used so far, and none match; says why.
    """
    latents = _choose("latents", use, begun, lambda: find_latents(need))
    if isinstance(latents, LatentSet):
        return ImageSource(latents, f"images: latents in {latents.folder} ({latents.form})")
    return ImageSource(None, f"{FROM_FILES}{latents}")


def choose_texts(
    use: CacheUse,
    folder: Path,
    model: Path,
    fingerprint: Callable[[Path], str],
    begun: Mapping[str, Any] | None,
) -> TextSource:
    """Choose the encoded prompts of a run, from the sets in `runs/<run>/texts`.

    Raises:
        ShardError: Texts are required, or were used so far, and none match; says why.
    """
    cached = _choose("texts", use, begun, lambda: find_texts(folder, model, fingerprint))
    if isinstance(cached, TextSet):
        return TextSource(cached, f"prompts: texts in {cached.folder} ({cached})")
    return TextSource(None, f"{FROM_ENCODERS}{cached}")


def _choose(
    name: str, use: CacheUse, begun: Mapping[str, Any] | None, find: Callable[[], Set | str]
) -> Set | str:
    """The set to read, or the end of a sentence that says why none is.

    A resumed run keeps what it began with.
    """
    if use is CacheUse.never:
        return f" (train.{name}=never)"
    if use is CacheUse.auto and begun is not None and begun.get(name) is None:
        return ", as this run began"
    match = find()
    if not isinstance(match, str):
        return match
    if use is CacheUse.always or begun is not None:
        reason = f"train.{name}=always" if begun is None else f"this run began with {name}"
        raise ShardError(f"{reason}, but {match}; `make labels ARGS={name}=model` writes them")
    return f": {match}"


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
    name = set_name(find_vae(need.model).sha256, need.resolution, need.buckets)
    if name not in sets:
        return (
            f"{need.folder} has {', '.join(sets)}, but this VAE, resolution and buckets are {name}"
        )
    latents = read_set(need.folder / name)
    if latents is None:
        return f"the latents in {need.folder / name} are not complete"
    if need.flip and not latents.form.flip:
        return (
            f"train.flip=true mirrors images, and {latents.folder} has no mirrored ones (it was "
            "written with label.latents.flip=false)"
        )
    return latents


def find_texts(folder: Path, model: Path, fingerprint: Callable[[Path], str]) -> TextSet | str:
    """Return the complete set that matches, or the reason why there is none."""
    sets = sorted(path.name for path in folder.glob("*-*") if path.is_dir())
    if not sets:
        return f"there are no texts in {folder}"
    text = find_text(model, fingerprint)
    name = texts.set_name(text.family.name, text.sha256)
    if name not in sets:
        return f"{folder} has {', '.join(sets)}, but this model's text encoders are {name}"
    return texts.read_set(folder / name) or f"the texts in {folder / name} are not complete"
