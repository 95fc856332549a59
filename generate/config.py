"""Settings of prompt sets, of the sampler, and of pairs that are generated."""

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from data.devices import Dtype, check_device
from data.images import Size


class PromptsKind(Enum):
    """Where prompts come from, and in which layout."""

    miniature = "miniature"
    """Prompts of the embedded world (`split`: test or validation; train to generate pairs for)."""
    lines = "lines"
    """A text file, one prompt a line."""
    parti = "parti"
    """PartiPrompts.tsv: columns Prompt, Category, Challenge; quotes are ordinary characters."""
    hpd = "hpd"
    """HPDv2's benchmark: a JSON list of prompts, or a folder of such lists, one for each style."""
    table = "table"
    """A Parquet, TSV or CSV file, a JSON list or JSON lines, with a column of prompts and optional
    columns `category` and `challenge`; or a folder of Parquet files (`split`)."""
    pairs = "pairs"
    """The prompts of the run's own pair set, from files of another `split` than it trains on."""


class Scheduler(Enum):
    """The scheduler that images are sampled with."""

    ddim = "ddim"
    """Deterministic DDIM (eta 0) on the model's own noise schedule; for flow-matching models, for
    which that step is Euler's, the scheduler in the model's folder."""
    own = "own"
    """The scheduler in the model's folder, configured as it is there."""


@dataclass(kw_only=True, slots=True)
class PromptsSpec:
    """A set of prompts to sample images for."""

    name: str = "???"
    """Its name in tables and reports."""
    kind: PromptsKind = PromptsKind.lines
    """Its source."""
    path: str = ""
    """The file, where the kind has one; or owner/name/file of a hub data set."""
    revision: str | None = None
    """The hub's 40-digit commit; never a branch."""
    split: str = "test"
    """The part of the source, where it has parts; of files the whole name, as in `pairs.split`."""
    column: str = ""
    """The table's column of prompts; empty takes `prompt` or `caption`, whichever exists."""
    max_prompts: int = 0
    """Take at most this many, starting with the first; 0 takes all."""
    skip_prompts: int = 0
    """Leave out this many distinct prompts at the start, before `max_prompts` counts."""
    exclude_trained: bool = False
    """Leave out prompts that occur in a training pair; case and whitespace are ignored."""


class ImageFormat(Enum):
    """How generated images are encoded in a pair set."""

    png = "png"
    """Lossless; an SDXL image of 1024 pixels takes about 1.5 MB."""
    webp = "webp"
    """Lossless WebP, which is smaller and slower to write."""
    jpeg = "jpeg"
    """Lossy, with `generate.quality`."""

    @property
    def suffix(self) -> str:
        """The ending of its files, without the dot."""
        return {"jpeg": "jpg"}.get(self.value, self.value)


def check_sides(section: str, width: int | None, height: int | None) -> None:
    """Refuse images that no model samples.

    Raises:
        ValueError: Names the setting.
    """
    for name, side in (("width", width), ("height", height)):
        if side is not None and side < 8:
            raise ValueError(
                f"{section}.{name}={side}; it must be at least 8 pixels, or null for "
                "model.resolution"
            )


MOST_IMAGES = 1000
"""Of a prompt; the seeds of two runs with neighbouring `seed` lie so far apart."""


@dataclass(kw_only=True, slots=True)
class GenerateSpec:
    """How pairs of one's own are made: images of every prompt, and which of them form pairs."""

    prompts: PromptsSpec = field(default_factory=lambda: PromptsSpec(name="prompts"))
    """The prompts to generate images for; those that models are judged on are left out."""
    models: dict[str, str] = field(default_factory=dict)
    """Name -> diffusers folder, hub id with its commit (`id@commit`), or LoRA weights for
    `model.path`. Empty takes the run's base model. With several, image k of each prompt is of model
    k modulo their number."""
    images: int = 4
    """Images a prompt, over all models."""
    steps: Any = 50
    """Denoising steps, one number or a list, of which image k of each prompt takes entry k modulo
    its length."""
    guidance: Any = 7.5
    """Classifier-free guidance scale, one number or a list, as `steps`; 1 switches it off."""
    scheduler: Scheduler = Scheduler.ddim
    """The scheduler that images are sampled with."""
    dtype: Dtype = Dtype.fp32
    """The format of the models' weights and activations."""
    width: int | None = None
    """Width of the images in pixels; null is `model.resolution`."""
    height: int | None = None
    """Height of the images in pixels; null is `model.resolution`."""
    pairing: str = "all"
    """Which images of a prompt form pairs: `all`, `adjacent` (image k and k + 1), or `random:n` (n
    different pairs a prompt, drawn from `seed` and the prompt)."""
    format: ImageFormat = ImageFormat.png
    """How images are encoded."""
    quality: int = 95
    """Of JPEG, from 1 to 100."""
    batch: int = 16
    """Images sampled together; halved when the device runs out of memory. It may change between the
    parts of an interrupted set, and with it the last bit of an image."""
    shard_prompts: int = 64
    """Prompts of one file of pairs. Each process takes whole files: lower it for few prompts on
    many GPUs."""
    first_seed: int = 1_000_000
    """Seed of the noise of each prompt's first image where `seed` is 0. Image k has k more, and
    each step of `seed` 1000 more; no seed may be one that models are judged with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; with several processes a machine, each takes its own GPU."""
    cpu_offload: bool = False
    """Keep only the part of a model on the GPU that is running: slower, for models that do not fit.
    It changes no image."""

    def size(self, resolution: int) -> Size:
        """The size of the images; `resolution` is the model's."""
        return Size(self.width or resolution, self.height or resolution)

    def __post_init__(self) -> None:
        check_sides("generate", self.width, self.height)
        self.steps = _listed("steps", self.steps, int)
        self.guidance = _listed("guidance", self.guidance, float)
        for name in ("batch", "shard_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"generate.{name}={getattr(self, name)}; it must be at least 1")
        if not 2 <= self.images <= MOST_IMAGES:
            raise ValueError(
                f"generate.images={self.images}; a pair needs 2 images of a prompt, and there may "
                f"be {MOST_IMAGES}"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"generate.quality={self.quality}; it must lie between 1 and 100")
        check_device("generate.device", self.device)
        self._check_pairing()
        self._check_models()

    @property
    def num_random_pairs(self) -> int | None:
        """The number n of `random:n`, else None."""
        match = re.fullmatch(r"random:(\d+)", self.pairing)
        return int(match[1]) if match else None

    def _check_models(self) -> None:
        for name, path in self.models.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"generate.models has the name {name!r}; use letters, digits, '.', '_' and '-'"
                )
            if not path.strip():
                raise ValueError(
                    f"generate.models.{name} is empty; give a diffusers folder, a hub id with its "
                    "commit (`id@commit`), or LoRA weights for model.path"
                )
        if len(self.models) > self.images:
            raise ValueError(
                f"generate.images={self.images} is fewer than the {len(self.models)} models of "
                "generate.models, of which each makes one image a prompt or more"
            )

    def _check_pairing(self) -> None:
        wanted, possible = self.num_random_pairs, self.images * (self.images - 1) // 2
        if self.pairing not in ("all", "adjacent") and not wanted:
            raise ValueError(
                f"generate.pairing={self.pairing}; allowed are all, adjacent, and random:n with n "
                "pairs a prompt, 1 or more"
            )
        if wanted and wanted > possible:
            raise ValueError(
                f"generate.pairing={self.pairing} needs more images: {self.images} images form "
                f"{possible} pairs; raise generate.images, or lower n"
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(name: str, value: Any, kind: type) -> list[Any]:
    """A setting of one number or a list of them, as a list.

    Raises:
        ValueError: It is neither, or a number is below 1.
    """
    values = value if isinstance(value, list) else [value]
    numbers = [kind(x) if _is_finite(x) and x == kind(x) else None for x in values]
    if not numbers or any(number is None or number < 1 for number in numbers):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(
            f"generate.{name}={value}; it must be {what}, 1 or more, or a list of such numbers, as "
            f"'generate.{name}=[{'20, 30' if kind is int else '1.5, 3'}]'"
        )
    return numbers
