"""The description of a run of stage two, and what decides its weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.latents import LatentSet
from data.artifacts.readable import reading
from data.artifacts.texts import TextSet
from data.models.adapter import ADAPTER, check_adapter
from data.pairs.config import PairsSpec
from data.storage.paths import user_path
from train.config import ModelSpec, TrainSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """One run of stage two: what is trained on what, and where it goes."""

    folder: Path
    """`runs/<run>/train`."""
    labels: Path
    """The label set."""
    pairs: PairsSpec
    model: ModelSpec
    train: TrainSpec
    seed: int
    latents: LatentSet | None = None
    """Stage one's latents, to be read instead of the images; None reads the pair files."""
    texts: TextSet | None = None
    """Stage one's encoded prompts; None encodes them in every step."""
    sources: tuple[str, ...] = ()
    """Lines for the terminal that say where images and encoded prompts come from."""
    settings: Mapping[str, Any]
    """Everything that decides the weights, as JSON values; a folder belongs to one of these."""

    @property
    def pipeline(self) -> Path:
        """The result."""
        return self.folder / "pipeline"

    @property
    def single_file(self) -> Path:
        """The result in one file, if that is wanted (train.export.single_file)."""
        return self.folder / "single_file.safetensors"

    @property
    def adapter(self) -> Path:
        """For LoRA: the result without the base, in diffusers' format."""
        return self.folder / "lora"

    @property
    def average(self) -> Path:
        """With `train.ema`: the average, as a pipeline or, for LoRA, as an adapter."""
        return self.folder / ("lora_ema" if self.train.lora.rank else "pipeline_ema")


def checked_start(setting: str) -> Path:
    """The file that `train.lora.start` means: itself, or the one in the folder of an adapter.

    Raises:
        UnreadableError: It is damaged or incomplete, or is no LoRA.
    """
    path = user_path(setting, "train.lora.start")
    path = path / ADAPTER if path.is_dir() else path
    check_adapter(path, f"train.lora.start={setting}")
    return path


def fingerprint(model: ModelSpec) -> str:
    """Identify a model cheaply: a hub id by its commit, a folder by a digest of its files.

    The digest covers the name, the size and the first MiB of each file.

    Raises:
        UnreadableError: A file cannot be read; names it.
    """
    folder = user_path(model.path)
    if not folder.exists() and model.revision:
        return f"{model.path}@{model.revision}"
    digest = hashlib.sha256()
    with reading(f"model.path={model.path}"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                head = file.read(1 << 20)
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\0{path.stat().st_size}\0".encode() + head)
    return digest.hexdigest()
