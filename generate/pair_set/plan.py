"""The plan of a set of generated pairs: its images, its files, and the settings that decide them.

Prompts are cut into blocks, one for each file of pairs. The images of a block wait in a folder
until all are there, then its file is written and the folder removed. Does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.artifacts.config_diff import differences
from data.artifacts.manifest import Manifest, read_manifest
from data.images import Size
from data.pairs.own import KIND
from generate.config import MOST_IMAGES, GenerateSpec
from generate.image_files import Model
from generate.pair_set.pairing import num_pairs
from generate.prompts.files import Prompt
from generate.prompts.prompt_set import PromptSet

SPLIT = "train"
"""The split of generated pairs: what people type to read them is `pairs=pickapic`'s default."""
FAILED = ".txt"
"""Ends the name of what is written in place of an image that cannot be used: the reason."""


def first_seed(spec: GenerateSpec, seed: int) -> int:
    """The seed of each prompt's first image, in a run with this `seed`."""
    return spec.first_seed + MOST_IMAGES * seed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedImage:
    """One image to generate; it is done when its file exists, or that of a failure."""

    prompt: Prompt
    number: int
    """Which of the prompt's images it is, counted from 0."""
    model: str
    seed: int
    steps: int
    guidance: float
    path: Path

    @property
    def failed(self) -> Path:
        """The file that says why there is no image."""
        return self.path.with_suffix(FAILED)


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """Images of every prompt by one model or several, and the files of pairs they go into."""

    folder: Path
    spec: GenerateSpec
    models: tuple[Model, ...]
    prompts: PromptSet
    size: Size
    """The size of the images."""
    seed: int

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Model name -> what its images depend on."""
        return {model.name: model.fingerprint() for model in self.models}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the rows; equal settings give equal files on a CPU."""
        spec = self.spec
        names = [model.name for model in self.models]
        predictions = {m.name: m.prediction_type.value for m in self.models if m.prediction_type}
        return {
            "models": self.fingerprints,
            **({"order": names} if len(names) > 1 else {}),  # mappings are compared without it
            **({"predictions": predictions} if predictions else {}),
            "prompts": {"sha256": self.prompts.sha256, "number": len(self.prompts.prompts)},
            "images": spec.images,
            "steps": spec.steps,
            "guidance": spec.guidance,
            "scheduler": spec.scheduler.value,
            "dtype": spec.dtype.value,
            "resolution": self.size.recorded,
            "format": spec.format.value,
            **({"quality": spec.quality} if spec.format is spec.format.jpeg else {}),
            "pairing": spec.pairing,
            "shard_prompts": spec.shard_prompts,
            "first_seed": first_seed(self.spec, self.seed),
            **({"seed": self.seed} if spec.num_random_pairs else {}),
        }

    @property
    def num_images(self) -> int:
        """Images of all prompts together."""
        return len(self.prompts.prompts) * self.spec.images

    @property
    def num_pairs(self) -> int:
        """Pairs of all prompts together."""
        return len(self.prompts.prompts) * num_pairs(self.spec)

    @property
    def num_blocks(self) -> int:
        """How many files of pairs there will be."""
        return -(-len(self.prompts.prompts) // self.spec.shard_prompts)

    @property
    def work(self) -> Path:
        """The folder of images whose files of pairs are not yet written."""
        return self.folder / "images"

    def shard(self, block: int) -> Path:
        """The file of a block's pairs."""
        return self.folder / f"{SPLIT}-{block:05d}-of-{self.num_blocks:05d}.parquet"

    def images_folder(self, block: int) -> Path:
        """Where a block's images wait."""
        return self.work / f"{block:05d}"

    def prompts_of(self, block: int) -> tuple[Prompt, ...]:
        """The prompts of a block."""
        first = block * self.spec.shard_prompts
        return self.prompts.prompts[first : first + self.spec.shard_prompts]

    def images_of(self, block: int, prompt: Prompt) -> list[PlannedImage]:
        """The images of a prompt: number k takes entry k, modulo their number, of each list."""
        spec, names = self.spec, [model.name for model in self.models]
        folder = self.images_folder(block)
        return [
            PlannedImage(
                prompt=prompt,
                number=k,
                model=names[k % len(names)],
                seed=first_seed(self.spec, self.seed) + k,
                steps=spec.steps[k % len(spec.steps)],
                guidance=spec.guidance[k % len(spec.guidance)],
                path=folder / f"{prompt.id:07d}-{k:03d}.{spec.format.suffix}",
            )
            for k in range(spec.images)
        ]

    def batches(self, block: int, model: str) -> Iterator[list[PlannedImage]]:
        """A model's images of a block, in batches that have the same steps and guidance.

        They follow from the plan alone, whatever is done already: on a CPU the last bit of an image
        may depend on the batch.
        """
        alike: dict[tuple[int, float], list[PlannedImage]] = {}
        for prompt in self.prompts_of(block):
            for image in self.images_of(block, prompt):
                if image.model == model:
                    alike.setdefault((image.steps, image.guidance), []).append(image)
        for images in alike.values():
            for start in range(0, len(images), self.spec.batch):
                yield images[start : start + self.spec.batch]

    def is_done(self, image: PlannedImage) -> bool:
        """Whether an image was generated, or could not be."""
        return image.path.exists() or image.failed.exists()

    def num_done(self, block: int) -> int:
        """How many of a block's images are done, by the names in its folder."""
        if self.shard(block).exists():
            return len(self.prompts_of(block)) * self.spec.images
        try:
            paths = list(self.images_folder(block).iterdir())
            return sum(not path.name.startswith(".") for path in paths)
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def finished(self) -> Manifest | None:
        """The manifest, if the set is complete with these settings and its files have their sizes.

        Raises:
            ShardError: The manifest is damaged.
        """
        manifest = read_manifest(self.folder, KIND)
        if manifest is None or differences(manifest.settings, self.settings):
            return None
        sizes = {self.folder / file.name: file.bytes for file in manifest.files}
        whole = all(path.exists() and path.stat().st_size == size for path, size in sizes.items())
        return manifest if whole else None
