"""Which images have to be sampled, where their files are, and what they were made with.

Does not import torch, so that "is every image there?" is answered at once.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.artifacts.atomic import read_json, sha256_of, write_json
from data.artifacts.config_diff import differences, refuse_other_settings
from data.artifacts.readable import read_json_object, reading
from data.models.adapter import ADAPTER, check_adapter
from data.models.forward_process import Prediction
from data.storage.hub import HUB_ID, HubError, check_commit
from data.storage.paths import user_path
from generate.prompts.files import Prompt
from generate.prompts.prompt_set import PromptSet

SETTINGS = "settings.json"


class SamplesError(ValueError):
    """A model or its images cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model to sample: a diffusers folder or a hub id with its commit, optionally with LoRA."""

    name: str
    path: str
    revision: str | None = None
    adapter: str = ""
    """A safetensors file of LoRA weights to load onto it."""
    prediction_type: Prediction | None = None
    """What it predicts, where its scheduler's configuration does not say."""

    def __post_init__(self) -> None:
        if self.path.startswith("~"):
            object.__setattr__(self, "path", str(user_path(self.path, f"models.{self.name}")))

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder on this machine."""
        return Path(self.path).is_dir()

    def check(self, advice: str) -> None:
        """Refuse a model that cannot be loaded, before any model is loaded.

        Raises:
            ValueError: The model is not there (the message ends with `advice`), or its index or
                its LoRA weights are damaged.
        """
        if self.adapter:
            check_adapter(Path(self.adapter), f"model {self.name!r}")
        if self.is_local and (Path(self.path) / "model_index.json").is_file():
            read_json_object(Path(self.path) / "model_index.json", f"model {self.name!r}")
            return
        what = f"model {self.name!r}: {self.path}"
        if self.is_local or not self.revision:
            problem = "has no model_index.json" if self.is_local else "is no folder"
            raise SamplesError(f"{what} {problem}; {advice}")
        try:
            check_commit(what, self.revision)
        except HubError as error:
            raise SamplesError(str(error)) from error
        if not (match := HUB_ID.fullmatch(self.path)) or match[2]:
            raise SamplesError(f"{what} is neither a folder nor a hub id owner/name; {advice}")

    def fingerprint(self) -> str:
        """What the images depend on: a hash over the folder's weights and settings, or the commit.

        The model card is left out: people edit it, and no image changes.

        Raises:
            UnreadableError: A file cannot be read; names it.
        """
        with reading(f"model {self.name!r}"):
            if self.adapter:
                return f"{self._base()}+{sha256_of(Path(self.adapter))}"
            return self._base()

    def _base(self) -> str:
        if not self.is_local:
            return f"{self.path}@{self.revision}"
        root, digest = Path(self.path), hashlib.sha256()
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            inside = path.relative_to(root)
            if path.suffix != ".md" and not any(part.startswith(".") for part in inside.parts):
                digest.update(f"{inside}\0{sha256_of(path)}\n".encode())
        return digest.hexdigest()


def model_at(base: Model, name: str, value: str) -> Model:
    """The model that a setting `models.NAME` refers to; LoRA weights are loaded onto `base`."""
    path, _, revision = value.partition("@")
    if user_path(value, f"models.{name}").exists():
        path, revision = value, ""  # the @ is of the path
    adapter = adapter_at(path)
    if adapter is not None:
        return replace(base, name=name, adapter=str(adapter))
    if (path, revision or None) == (base.path, base.revision):
        return replace(base, name=name)
    return Model(name=name, path=path, revision=revision or None)


def adapter_at(path: str) -> Path | None:
    """The file of LoRA weights that a path refers to, or None where it refers to something else."""
    place = user_path(path)
    if place.suffix == ".safetensors" and place.is_file():
        return place
    alone = not (place / "model_index.json").exists() and (place / ADAPTER).is_file()
    return place / ADAPTER if alone else None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of one model; it has been sampled when its file exists."""

    model: str
    prompt: Prompt
    seed: int
    path: Path


def list_samples(
    folder: Path, model: str, prompts: PromptSet, seeds: Sequence[int]
) -> list[Sample]:
    """All images that a model has to sample, prompt by prompt."""
    return [
        Sample(model, prompt, seed, folder / model / f"{prompt.id:05d}-{seed}.png")
        for prompt in prompts.prompts
        for seed in seeds
    ]


def samples_of_rank(images: Sequence[Sample], rank: int, world_size: int) -> list[Sample]:
    """The images that one rank samples: whole prompts, so that a prompt's seeds stay together."""
    order = {key: place for place, key in enumerate(dict.fromkeys(p.prompt.id for p in images))}
    return [image for image in images if order[image.prompt.id] % world_size == rank]


def missing(images: Iterable[Sample]) -> list[Sample]:
    """The images that have not been sampled yet; files appear whole or not at all."""
    return [image for image in images if not image.path.exists()]


def link_same_images(images: Iterable[Sample], earlier: Path, wanted: Mapping[str, Any]) -> int:
    """Link a model's missing images from an earlier folder of them; returns how many were linked.

    None is linked that was made with other settings. Where the disk has no hard links they are
    sampled again.
    """
    recorded = earlier / SETTINGS
    advice = f"delete {earlier} and run the same command again"
    if not recorded.exists() or differences(read_json(recorded, advice), wanted):
        return 0
    number = 0
    for image in missing(images):
        with suppress(OSError):
            image.path.hardlink_to(earlier / image.path.name)
            number += 1
    return number


def ensure_same_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to add images to a folder whose images were made with other settings.

    The first process to come records its settings in the folder.

    Raises:
        ShardError: The folder's images were made with other settings; names each difference.
    """
    path = folder / SETTINGS
    if not path.exists():
        write_json(path, wanted, keep_existing=True)
    recorded = read_json(path, f"delete {folder} and run the same command again")
    refuse_other_settings(folder, recorded, wanted)
