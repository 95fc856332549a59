"""Encoded images -> arrays that a backbone takes, without torch.

The two common ways: CLIP and its relatives resize the shortest side and crop the middle, on 8-bit
pixels; HPS resizes the longest side and pads to a square, on float pixels, which is why its numbers
depend on whether the resizing antialiases.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data.artifacts.schemas import Status
from data.images import Size, TooLargeImageError, UnreadableImageError, decode, fit, to_pixels

BICUBIC = 3
"""PIL.Image.Resampling.BICUBIC; PIL itself is imported by data/images.py alone."""

_ADDRESS = re.compile(r" <[^<>]* object at 0x[0-9a-f]+>")


@runtime_checkable
class PilImage(Protocol):
    """What is used of a PIL image."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def height(self) -> int: ...  # noqa: D102
    def resize(self, size: tuple[int, int], resample: int) -> "PilImage": ...  # noqa: D102
    def crop(self, box: tuple[int, int, int, int]) -> "PilImage": ...  # noqa: D102


class ResizeMode(Enum):
    """How an image is brought to a backbone's size."""

    CROP = "shortest side bicubic on uint8, center crop"
    """PickScore, MPS: PIL's antialiased bicubic, rounded to 8 bits; the crop begins at a half pixel
    rounded down."""
    CROP_EVEN = "shortest side bicubic on uint8, center crop, half a pixel rounded to even"
    """CLIP, LAION aesthetics, ImageReward, CycleReward: the same, but a crop that begins at a half
    pixel is rounded as in OpenAI's code (torchvision's rounding), not as in Hugging Face's."""
    PAD = "longest side bicubic on float, zero pad to square before normalisation"
    """HPSv2 and v2.1: bicubic on [0, 1] floats, not clamped."""
    AREA = "bicubic on uint8 to an area, both sides multiples of 28, nothing cut off"
    """HPSv3: what Qwen2-VL reads, an area of about `side` x `side` pixels."""
    NONE = "as it is"
    """Every pixel, at the image's own size."""


CROPS = (ResizeMode.CROP, ResizeMode.CROP_EVEN)


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """How an image is prepared; equal transforms give equal arrays and are computed once."""

    mode: ResizeMode
    side: int = 0
    """Height and width in pixels, or their geometric mean (AREA); unused for NONE."""
    antialias: bool = True
    """Whether PAD antialiases when it makes an image smaller."""

    def __call__(self, image: PilImage, small: PilImage | None = None) -> np.ndarray:
        """The image as (height, width, 3): uint8, or float32 around [0, 1] for PAD.

        `small` is the image with its shortest side resized already, where the mode crops.
        """
        if self.mode in CROPS:
            small = resize_short_side(image, self.side) if small is None else small
            return to_pixels(center_crop(small, self.side, self.mode))  # type: ignore[arg-type]
        if self.mode is ResizeMode.AREA:
            return fill_area(image, self.side)
        pixels = to_pixels(image)  # type: ignore[arg-type]
        return pad_to(pixels, self.side, self.antialias) if self.mode is ResizeMode.PAD else pixels


@dataclass(frozen=True, slots=True)
class Cut:
    """An image's middle at a size: the trainer's transform, for latents."""

    size: Size

    def __call__(self, image: PilImage) -> np.ndarray:
        """The image as uint8 (height, width, 3)."""
        return fit(image, self.size)  # type: ignore[arg-type]


Transform = ImageTransform | Cut
"""Any way to prepare an image."""


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """An image after every transform, or why it could not be read."""

    status: Status
    reason: str = ""
    width: int | None = None
    height: int | None = None
    arrays: dict[Transform, np.ndarray] = field(default_factory=dict)


def process_image(content: bytes, transforms: Sequence[Transform]) -> ProcessedImage:
    """Decode an image once and apply all transforms; a bad image is a result, not an error."""
    try:
        image = decode(content)
    except TooLargeImageError as error:
        return ProcessedImage(Status.TOO_LARGE, _without_addresses(str(error)))
    except UnreadableImageError as error:
        return ProcessedImage(Status.UNREADABLE_IMAGE, _without_addresses(str(error)))
    own = [one for one in transforms if isinstance(one, ImageTransform)]
    sides = {transform.side for transform in own if transform.mode in CROPS}
    small = {side: resize_short_side(image, side) for side in sides}  # once for both crops
    arrays: dict[Transform, np.ndarray] = {one: one(image, small.get(one.side)) for one in own}
    arrays |= {cut: cut(image) for cut in transforms if isinstance(cut, Cut)}
    return ProcessedImage(Status.OK, "", image.width, image.height, arrays)


def process_images(items: Sequence[tuple[bytes, Sequence[Transform]]]) -> list[ProcessedImage]:
    """`process_image` for several images: the unit of work of a decoder."""
    return [process_image(content, transforms) for content, transforms in items]


def _without_addresses(reason: str) -> str:
    """A reason without memory addresses, so that a repeated run writes the same bytes."""
    return _ADDRESS.sub("", reason)


# --- CLIP's transform ----------------------------------------------------------------------------


def resize_short_side(image: PilImage, side: int) -> PilImage:
    """Shortest side to `side`, the other cut to whole pixels, as torchvision and CLIP's do."""
    short, long = sorted((image.width, image.height))
    other = int(side * long / short)
    width, height = (side, other) if image.width <= image.height else (other, side)
    if (width, height) == (image.width, image.height):
        return image
    return image.resize((width, height), BICUBIC)


def center_crop(image: PilImage, side: int, mode: ResizeMode) -> PilImage:
    """Crop the square in the middle as CLIPImageProcessor does, or as torchvision does."""
    left, top = (
        round((length - side) / 2) if mode is ResizeMode.CROP_EVEN else (length - side) // 2
        for length in (image.width, image.height)
    )
    return image.crop((left, top, left + side, top + side))


# --- Qwen2-VL's transform ------------------------------------------------------------------------

CELL = 28
"""Pixels of a side that become one token: patches of 14, merged two by two."""
LONGEST = 200
"""Images whose sides differ by more than this factor are not read."""


def fill_area(image: PilImage, side: int) -> np.ndarray:
    """The whole image in about side x side pixels; nothing (0, 0, 3) where it is too long."""
    short, long = sorted((image.width, image.height))
    if long > LONGEST * short:
        return np.zeros((0, 0, 3), np.uint8)
    size = cells(image.width, image.height, side * side)
    return to_pixels(image.resize(size, BICUBIC))  # type: ignore[arg-type]


def cells(width: int, height: int, area: int) -> tuple[int, int]:
    """Sides in multiples of `CELL`: the nearest ones, or those that keep to the area.

    The area is a least and a greatest one, as HPSv3 sets it: a larger image becomes at most this
    large, a smaller one at least.
    """
    wide, tall = (max(CELL, round(length / CELL) * CELL) for length in (width, height))
    if wide * tall > area:
        shrink = math.sqrt(width * height / area)
        wide, tall = (max(CELL, math.floor(n / shrink / CELL) * CELL) for n in (width, height))
    elif wide * tall < area:
        grow = math.sqrt(area / (width * height))
        wide, tall = (math.ceil(n * grow / CELL) * CELL for n in (width, height))
    return wide, tall


# --- HPS's transform -----------------------------------------------------------------------------


def pad_to(pixels: np.ndarray, side: int, antialias: bool) -> np.ndarray:
    """Longest side to `side`, zeros around to a square; float32, not clamped to [0, 1].

    As HPSv2's `ResizeMaxSize` on tensors, except that an image which needs no resizing is padded
    too (there it is not, and then does not fit its batch).
    """
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    tall, wide = max(round(height * scale), 1), max(round(width * scale), 1)
    columns = turned(pixels).astype(np.float32) / np.float32(255)
    rows = resize_first(columns, wide, antialias).swapaxes(0, 1)
    square = np.zeros((side, side, 3), np.float32)
    top, left = (side - tall) // 2, (side - wide) // 2
    square[top : top + tall, left : left + wide] = resize_first(rows, tall, antialias)
    return square


def turned(pixels: np.ndarray) -> np.ndarray:
    """A uint8 image transposed; moving whole pixels is twice as fast as moving bytes."""
    whole = np.ascontiguousarray(pixels).view("V3")[..., 0]
    return np.ascontiguousarray(whole.T).view(np.uint8).reshape(*whole.T.shape, 3)


def resize_first(pixels: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """Bicubic resizing along the first axis, as torch's `interpolate(..., align_corners=False)`.

    A sparse matrix adds whole rows, tap by tap in their order: no BLAS threads compete, and the
    result depends on no library's blocking.
    """
    length = len(pixels)
    if length == size:
        return pixels
    rows = np.ascontiguousarray(pixels).reshape(length, -1)
    resized: np.ndarray = tap_matrix(length, size, antialias) @ rows
    return resized.reshape(size, *pixels.shape[1:])


@lru_cache(maxsize=64)
def tap_matrix(length: int, size: int, antialias: bool) -> Any:
    """The weights of `taps` as a sparse (size, length) matrix."""
    from scipy.sparse import csr_array  # half a second, which only HPS needs

    index, weight = taps(length, size, antialias)
    ends = np.arange(size + 1) * len(index)
    return csr_array((weight.T.ravel(), index.T.ravel(), ends), shape=(size, length))


@lru_cache(maxsize=64)
def taps(length: int, size: int, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Source positions and weights of each output pixel, both (tap, size).

    Keys' cubic has a = -0.5 and a support that grows with the reduction where torch antialiases
    (as PIL does), and a = -0.75 and four taps where it does not. Positions are float32 as torch's.
    """
    scale = np.float32(length) / np.float32(size)
    centre = scale * (np.arange(size, dtype=np.float32) + np.float32(0.5))
    if antialias:
        stretch = np.maximum(scale, np.float32(1))
        first = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)
        last = np.minimum((centre + 2 * stretch + 0.5).astype(int), length)
        index = first + np.arange(int((last - first).max()))[:, None]
        away = (index.astype(np.float32) - centre + np.float32(0.5)) / stretch
        weight = keys_cubic(away, -0.5) * (index < last)
        weight = weight / weight.sum(axis=0)
    else:
        first = np.floor(centre - 0.5).astype(int) - 1
        index = first + np.arange(4)[:, None]
        away = index.astype(np.float32) - (centre - np.float32(0.5))
        weight = keys_cubic(away, -0.75)
    return index.clip(0, length - 1), weight.astype(np.float32)


def keys_cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981), zero outside [-2, 2]."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
