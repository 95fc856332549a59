"""Settings of aspect buckets: the sizes to which images are cut."""

from dataclasses import dataclass, fields
from enum import Enum

from data.images import Size
from data.models.buckets import SDXL, SDXL_RESOLUTION, free_sizes


class BucketKind(Enum):
    """Which sizes images are cut to."""

    none = "none"
    """One: the square of `model.resolution`."""
    sdxl = "sdxl"
    """The 40 sizes that SDXL was trained in, for a resolution of 1024."""
    free = "free"
    """Sizes of the square's area in steps of `step` pixels."""


@dataclass(kw_only=True, slots=True)
class BucketSpec:
    """Aspect buckets: sizes of about equal area, of which each pair gets the one that fits it."""

    kind: BucketKind = BucketKind.none
    """Which sizes."""
    step: int = 64
    """For `free`: pixels of which all sides are multiples."""
    aspect: float = 2.0
    """For `free`: how many times the shorter side the longer one may be."""
    unit: int = 8
    """Pairs of one size that are dealt together; `train.batch` is a multiple of it. Micro-batches
    are parts of a unit, and no larger than one. A batch has at most as many sizes as units."""

    def __post_init__(self) -> None:
        if self.step < 8:
            raise ValueError(f"train.buckets.step={self.step}; it must be at least 8 pixels")
        if not 1 <= self.aspect <= 32:
            raise ValueError(f"train.buckets.aspect={self.aspect:g}; it must be in [1, 32]")
        if self.unit < 1:
            raise ValueError(f"train.buckets.unit={self.unit}; it must be at least 1")
        unread = {BucketKind.none: ("step", "aspect", "unit"), BucketKind.sdxl: ("step", "aspect")}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in unread.get(self.kind, ()) and value != item.default:
                raise ValueError(
                    f"train.buckets.{item.name}={value:g} has no meaning for train.buckets.kind="
                    f"{self.kind.value}; choose buckets=free, or leave it out"
                )

    def check_batches(self, batch: int, micro_batch: int) -> None:
        """Refuse units that are no whole part of a batch, or no whole micro-batches.

        Raises:
            ValueError: Says which settings to change.
        """
        if self.kind is BucketKind.none:
            return
        if batch % self.unit:
            raise ValueError(
                f"train.batch={batch} is no multiple of train.buckets.unit={self.unit}, the pairs "
                "of one size that are dealt together; change one of them"
            )
        if self.unit % min(self.unit, micro_batch):
            raise ValueError(
                f"train.buckets.unit={self.unit} is no multiple of train.micro_batch={micro_batch},"
                " whose pairs have one size; change one of them"
            )

    def sizes(self, resolution: int) -> tuple[Size, ...]:
        """The sizes for a `model.resolution`; one, the square, where there are no buckets.

        Raises:
            ValueError: The resolution is not one for which there are such sizes.
        """
        if self.kind is BucketKind.none:
            return (Size(resolution, resolution),)
        if self.kind is BucketKind.sdxl:
            if resolution != SDXL_RESOLUTION:
                raise ValueError(
                    f"buckets=sdxl are the sizes for model.resolution={SDXL_RESOLUTION}, but it is "
                    f"{resolution}; choose buckets=free"
                )
            return SDXL
        if resolution % self.step:
            raise ValueError(
                f"model.resolution={resolution} is no multiple of train.buckets.step={self.step}; "
                "change one of them"
            )
        return free_sizes(resolution, self.step, self.aspect)
