"""Decodes images to pixels and encodes them; the only file with PIL that meets hostile bytes."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are opened at all; PIL registers about seventy, most of them attack surface."""
UNIDENTIFIED = f"not a picture of {', '.join(FORMATS)}"
"""A reason that stands in label files: its wording is kept, so that labels made by older versions
and by this one are equal to the byte."""

MAX_PIXELS = 64_000_000
"""Larger images are refused unread: no generator makes them, and bombs do."""

MAX_ASPECT = 32
"""The longer side may be so many times the shorter: a 20000x1 image is small, but 4.5 million
pixels wide once its short side is 224."""

ImageFile.LOAD_TRUNCATED_IMAGES = False
# Set once: images are decoded by threads, and `warnings.catch_warnings` is not safe in threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)


class UnreadableImageError(ValueError):
    """These bytes are not an image we can read; the message says why."""


class TooLargeImageError(UnreadableImageError):
    """The image has more than `MAX_PIXELS` pixels, or would have them once resized."""


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def recorded(self) -> int | str:
        """The side of a square, or words: what settings and reports say of it."""
        return self.width if self.width == self.height else str(self)

    def __str__(self) -> str:
        """As in `640x384`, the width first."""
        return f"{self.width}x{self.height}"


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded image to RGB, whatever its name says; animations give their first frame.

    Raises:
        TooLargeImageError: More than `max_pixels` pixels, or one side `MAX_ASPECT` times the other.
        UnreadableImageError: Not an image, torn, or of a format outside `FORMATS`.
        MemoryError: This machine has too little memory, which says nothing about the image.
    """
    if not content:
        raise UnreadableImageError("no bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(image, max_pixels)
        image.load()  # `verify()` passes on a JPEG cut in half
        return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeImageError(str(error)) from error
    except (UnreadableImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        raise UnreadableImageError(UNIDENTIFIED) from error
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def size_of(content: bytes) -> Size | None:
    """The size that an encoded image's header says; None where none can be read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return Size(*image.size)
    except Exception:  # what `decode` says of it is kept
        return None


def _check_size(image: Image.Image, max_pixels: int) -> None:
    short, long = sorted(image.size)
    size = f"{image.width}x{image.height} pixels"
    if short * long > max_pixels:
        raise TooLargeImageError(size)
    if long > MAX_ASPECT * short:
        raise TooLargeImageError(f"{size}, one side more than {MAX_ASPECT} times the other")


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL's conversion, which drops an alpha channel and knows nothing of a rotation in EXIF.

    Except for 16-bit greyscale: PIL cuts all that is brighter than 255, so that nearly everything
    is white; the high byte is kept instead, as PIL does with 16-bit colour.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> np.ndarray:
    """RGB image as uint8 array (height, width, 3)."""
    return np.asarray(image, dtype=np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 array (height, width, 3) as a lossless PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """uint8 array (height, width, 3) as JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def encode_webp(pixels: np.ndarray) -> bytes:
    """uint8 array (height, width, 3) as a lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", lossless=True, quality=0, method=2)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Crop:
    """Where the middle of a resized image lies that is kept; all in pixels."""

    width: int
    """Size of the resized image."""
    height: int
    left: int
    """Cut from the resized image before the kept part begins."""
    top: int


def central_crop(image: Size, target: Size) -> Crop:
    """How an image becomes one of the target's size: resized to cover it, the rest cut evenly."""
    scale = max(target.width / image.width, target.height / image.height)
    wide = max(target.width, round(image.width * scale))
    tall = max(target.height, round(image.height * scale))
    return Crop(wide, tall, (wide - target.width) // 2, (tall - target.height) // 2)


def fit(image: Image.Image, target: Size) -> np.ndarray:
    """The middle of an image as uint8 array (height, width, 3) of the target's size.

    Nothing is changed where the image has this size already.
    """
    if image.size != (target.width, target.height):
        cut = central_crop(Size(*image.size), target)
        resized = image.resize((cut.width, cut.height), Image.Resampling.BILINEAR)  # antialiased
        right, bottom = cut.left + target.width, cut.top + target.height
        image = resized.crop((cut.left, cut.top, right, bottom))
    return to_pixels(image)


def fit_square(image: Image.Image, side: int) -> np.ndarray:
    """The image's central square as uint8 array (side, side, 3): shortest side resized, rest cut.

    Nothing is changed where the image has this size already.
    """
    return fit(image, Size(side, side))
