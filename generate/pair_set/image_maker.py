"""Generates planned images of one model, batch by batch, and writes each to a file of its own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np

from data.artifacts.atomic import ShardError, write_bytes
from data.devices import choose_device
from data.distributed import Rank, num_workers
from data.images import encode_jpeg, encode_png, encode_webp
from generate.config import GenerateSpec, ImageFormat
from generate.image_files import Model, SamplesError
from generate.pair_set.plan import PairPlan, PlannedImage
from generate.pair_set.shard_writer import write_shard
from generate.pipelines import check_model
from generate.sampler import ImageGenerator, unless_out_of_memory

SECTION = "generate"
"""The settings that messages name."""
MOST_FAILURES = 8
"""So many images in a row that are not finite are no accident of some prompts: the run ends."""
NOT_FINITE = "values that are not finite"


class ImageMaker:
    """A model with what is needed to write its images."""

    def __init__(self, generator: ImageGenerator, spec: GenerateSpec) -> None:
        self.generator, self._encode = generator, encoder(spec)
        self._room = spec.batch
        self._failures: list[PlannedImage] = []
        self._threads = ThreadPoolExecutor(num_workers(None))

    @classmethod
    def load(cls, plan: PairPlan, model: Model, rank: Rank) -> "ImageMaker":
        """Load a model.

        Raises:
            ValueError: It cannot be loaded, or not be sampled with this scheduler.
        """
        spec = plan.spec
        generator = ImageGenerator.load(
            model,
            choose_device("generate.device", spec.device, rank),
            scheduler=spec.scheduler,
            dtype=spec.dtype,
            size=plan.size,
            steps=spec.steps[0],
            guidance=spec.guidance[0],
            section=SECTION,
            offload=spec.cpu_offload,
        )
        return cls(generator, spec)

    def make(self, images: Sequence[PlannedImage], is_done: Callable[[PlannedImage], bool]) -> None:
        """Generate a batch of equal steps and guidance, and write those of its images not yet done.

        Raises:
            SamplesError: Many images in a row are not finite, or the device has not enough memory
                for a single one.
            ShardError: A file cannot be written, as on a full disk.
        """
        left = list(images)
        while left:
            part = left[: self._room]
            sampled = unless_out_of_memory(partial(self._sample, part))
            if sampled is None:
                self._halve(len(part))
                continue
            pixels, finite = sampled
            todo = [row for row, image in enumerate(part) if not is_done(image)]
            write = partial(self._write, part, pixels, finite)
            list(self._threads.map(write, todo))
            self._count_failures(part, finite)
            left = left[len(part) :]

    def _sample(self, images: Sequence[PlannedImage]) -> tuple[np.ndarray, list[bool]]:
        first = images[0]
        return self.generator.sample_with_flags(
            [image.prompt.text for image in images],
            [image.seed for image in images],
            num_inference_steps=first.steps,
            guidance_scale=first.guidance,
        )

    def _halve(self, size: int) -> None:
        if size == 1:
            raise SamplesError(
                f"not enough device memory to generate one image of {self.generator.model!r}; "
                "lower model.resolution, or set generate.dtype=bf16"
            )
        self._room = size // 2

    def _write(
        self, images: Sequence[PlannedImage], pixels: np.ndarray, finite: list[bool], row: int
    ) -> None:
        if finite[row]:
            write_bytes(images[row].path, self._encode(pixels[row]))
        else:
            write_bytes(images[row].failed, NOT_FINITE.encode())

    def _count_failures(self, images: Sequence[PlannedImage], finite: list[bool]) -> None:
        for image, good in zip(images, finite, strict=True):
            self._failures = [] if good else [*self._failures, image]
            if len(self._failures) == MOST_FAILURES:
                for failure in self._failures:  # else a second run would take them for done
                    failure.failed.unlink(missing_ok=True)
                raise SamplesError(
                    f"model {image.model!r}: {MOST_FAILURES} images in a row, the last of "
                    f"{image.prompt.text!r} (seed {image.seed}), have {NOT_FINITE}; "
                    f"{self.generator.remedy}"
                )


def generate_blocks(plan: PairPlan, order: Sequence[int], rank: Rank) -> None:
    """Generate what is missing of these blocks, model by model, and write each that is complete."""
    for model in plan.models:
        check_model(model)
    for model in plan.models:
        load = cache(partial(ImageMaker.load, plan, model, rank))  # only where an image is missing
        for block in order:
            if not plan.shard(block).exists():
                generate_block(plan, block, model, load)
            if model is plan.models[-1] and not plan.shard(block).exists():
                write_shard(plan, block)


def generate_block(
    plan: PairPlan, block: int, model: Model, load: Callable[[], ImageMaker]
) -> None:
    """Generate a model's missing images of a block, unless another process finishes it first."""
    for batch in plan.batches(block, model.name):
        if plan.shard(block).exists():
            return
        if all(map(plan.is_done, batch)):
            continue
        try:
            load().make(batch, plan.is_done)
        except ShardError:
            if not plan.shard(block).exists():  # else its folder was removed meanwhile
                raise


def encoder(spec: GenerateSpec) -> Callable[[np.ndarray], bytes]:
    """The function that encodes pixels in the set's format."""
    if spec.format is ImageFormat.jpeg:
        return partial(encode_jpeg, quality=spec.quality)
    return encode_webp if spec.format is ImageFormat.webp else encode_png
