"""Encoded images -> arrays that a tower takes, without torch: worker processes import this.

Two ways of making an image fit are in use. CLIP and its kin shorten the short side and cut the
middle out, on 8-bit pixels; HPS shortens the long side and pads to a square, on float pixels,
which is why its numbers depend on whether the resizing antialiases.
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
from data.images import TooLargeImageError, UnreadableImageError, decode, fit_square, to_pixels

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
    """How an image is brought to a tower's size."""

    CROP = "shortest side bicubic on uint8, center crop"
    """PickScore, MPS: PIL's antialiased bicubic, rounded to 8 bits; half a pixel is cut off."""
    CROP_EVEN = "shortest side bicubic on uint8, center crop, half a pixel rounded to even"
    """CLIP, LAION aesthetics, ImageReward, CycleReward: the same, but where the middle begins at
    half a pixel, it is OpenAI's code (torchvision's rounding), not Hugging Face's."""
    PAD = "longest side bicubic on float, zero pad to square before normalisation"
    """HPSv2 and v2.1: bicubic on [0, 1] floats, not clamped."""
    AREA = "bicubic on uint8 to an area, both sides multiples of 28, nothing cut off"
    """HPSv3: what Qwen2-VL reads, of about `side` x `side` pixels."""
    SQUARE = "shortest side bilinear on uint8, center crop"
    """The trainer's, for latents: `images.fit_square`."""
    NONE = "as it is"
    """Every pixel, at the image's own size."""


CROPS = (ResizeMode.CROP, ResizeMode.CROP_EVEN)


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """How an image is made ready; equal views give equal arrays, so a view is prepared once."""

    fit: ResizeMode
    side: int = 0
    """Height and width in pixels, or their geometric mean (`Fit.AREA`); nothing for `Fit.NONE`."""
    antialias: bool = True
    """Whether `Fit.PAD` antialiases when it makes an image smaller."""

    def __call__(self, image: PilImage, small: PilImage | None = None) -> np.ndarray:
        """The image as (height, width, 3): uint8, or float32 around [0, 1] for `Fit.PAD`.

        `small` is the image with its shortest side resized already, where a view crops.
        """
        if self.fit in CROPS:
            small = resize_short_side(image, self.side) if small is None else small
            return to_pixels(center_crop(small, self.side, self.fit))  # type: ignore[arg-type]
        if self.fit is ResizeMode.AREA:
            return fill_area(image, self.side)
        if self.fit is ResizeMode.SQUARE:
            return fit_square(image, self.side)  # type: ignore[arg-type]
        pixels = to_pixels(image)  # type: ignore[arg-type]
        return pad_to(pixels, self.side, self.antialias) if self.fit is ResizeMode.PAD else pixels


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """One image made ready in every view asked for, or why it could not be."""

    status: Status
    reason: str = ""
    width: int | None = None
    height: int | None = None
    arrays: dict[ImageTransform, np.ndarray] = field(default_factory=dict)


def process_image(content: bytes, views: Sequence[ImageTransform]) -> ProcessedImage:
    """Decode an image once and make all its views; a bad image is an answer, not an error."""
    try:
        image = decode(content)
    except TooLargeImageError as error:
        return ProcessedImage(Status.TOO_LARGE, _lasting(str(error)))
    except UnreadableImageError as error:
        return ProcessedImage(Status.UNREADABLE_IMAGE, _lasting(str(error)))
    crops = {view.side for view in views if view.fit in CROPS}
    small = {
        side: resize_short_side(image, side) for side in crops
    }  # resized once for both ways to crop
    arrays = {view: view(image, small.get(view.side)) for view in views}
    return ProcessedImage(Status.OK, "", image.width, image.height, arrays)


def process_images(items: Sequence[tuple[bytes, Sequence[ImageTransform]]]) -> list[ProcessedImage]:
    """`process_image` for a chunk of images: the unit of work of a worker process."""
    return [process_image(content, views) for content, views in items]


def _lasting(reason: str) -> str:
    """A reason without memory addresses, so that a repeated run writes the same bytes."""
    return _ADDRESS.sub("", reason)


# --- CLIP's way ----------------------------------------------------------------------------------


def resize_short_side(image: PilImage, side: int) -> PilImage:
    """Shortest side to `side`, the other cut to whole pixels, as torchvision and CLIP's do."""
    short, long = sorted((image.width, image.height))
    other = int(side * long / short)
    width, height = (side, other) if image.width <= image.height else (other, side)
    if (width, height) == (image.width, image.height):
        return image
    return image.resize((width, height), BICUBIC)


def center_crop(image: PilImage, side: int, fit: ResizeMode) -> PilImage:
    """The square in the middle: as CLIPImageProcessor cuts it out, or as torchvision does."""
    left, top = (
        round((length - side) / 2) if fit is ResizeMode.CROP_EVEN else (length - side) // 2
        for length in (image.width, image.height)
    )
    return image.crop((left, top, left + side, top + side))


# --- Qwen2-VL's way ------------------------------------------------------------------------------

CELL = 28
"""Pixels of a side that become one token: patches of 14, merged two by two."""
LONGEST = 200
"""Images that are longer than this many times their height, or higher, are not read."""


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
        resize_short_side = math.sqrt(width * height / area)
        wide, tall = (
            max(CELL, math.floor(n / resize_short_side / CELL) * CELL) for n in (width, height)
        )
    elif wide * tall < area:
        grow = math.sqrt(area / (width * height))
        wide, tall = (math.ceil(n * grow / CELL) * CELL for n in (width, height))
    return wide, tall


# --- HPS's way -----------------------------------------------------------------------------------


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
    """A uint8 image with rows for columns; whole pixels are moved, twice as fast as bytes."""
    whole = np.ascontiguousarray(pixels).view("V3")[..., 0]
    return np.ascontiguousarray(whole.T).view(np.uint8).reshape(*whole.T.shape, 3)


def resize_first(pixels: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """Bicubic resizing along the first axis, as torch's `interpolate(..., align_corners=False)`.

    A sparse matrix adds whole rows, tap by tap in their order: no BLAS threads fight in the worker
    processes, and the result depends on no library's blocking.
    """
    length = len(pixels)
    if length == size:
        return pixels
    rows = np.ascontiguousarray(pixels).reshape(length, -1)
    found: np.ndarray = tap_matrix(length, size, antialias) @ rows
    return found.reshape(size, *pixels.shape[1:])


@lru_cache(maxsize=64)
def tap_matrix(length: int, size: int, antialias: bool) -> Any:
    """The weights of `taps` as a sparse (size, length) matrix."""
    from scipy.sparse import csr_array  # half a second, which only HPS's view needs

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
    center_crop = scale * (np.arange(size, dtype=np.float32) + np.float32(0.5))
    if antialias:
        stretch = np.maximum(scale, np.float32(1))
        first = np.maximum((center_crop - 2 * stretch + 0.5).astype(int), 0)
        last = np.minimum((center_crop + 2 * stretch + 0.5).astype(int), length)
        index = first + np.arange(int((last - first).max()))[:, None]
        away = (index.astype(np.float32) - center_crop + np.float32(0.5)) / stretch
        weight = keys_cubic(away, -0.5) * (index < last)
        weight = weight / weight.sum(axis=0)
    else:
        first = np.floor(center_crop - 0.5).astype(int) - 1
        index = first + np.arange(4)[:, None]
        away = index.astype(np.float32) - (center_crop - np.float32(0.5))
        weight = keys_cubic(away, -0.75)
    return index.clip(0, length - 1), weight.astype(np.float32)


def keys_cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981), zero outside [-2, 2]."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
