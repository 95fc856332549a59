"""Hostile images are refused with a reason; honest ones decode to the same pixels."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import images
from data.images import TooLargeImageError, UnreadableImageError


def encoded(mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, **{"format": "PNG"} | options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str):
    image = images.decode(encoded(mode))
    assert image.mode == "RGB"
    assert images.to_pixels(image).shape == (30, 40, 3)


def test_names_are_not_trusted():
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        assert images.decode(encoded(format=form)).size == (40, 30)
    assert images.decode(encoded("CMYK", format="JPEG")).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no bytes"),
        (b"\0" * 100, "not a picture of JPEG"),
        (b"<html><body>404 Not Found</body></html>", "not a picture of JPEG"),
        (encoded(format="JPEG")[:-200], "truncated"),
        (encoded()[:400], "truncated|Truncated"),
        (encoded(format="TIFF"), "not a picture of JPEG"),
    ],
    ids=["empty", "zeros", "html", "half a jpeg", "half a png", "tiff"],
)
def test_what_is_no_image_has_a_reason(content: bytes, reason: str):
    """The same reason each time: it stands in files that must not differ from run to run."""
    with pytest.raises(UnreadableImageError, match=reason) as first:
        images.decode(content)
    with pytest.raises(UnreadableImageError) as second:
        images.decode(bytes(content))
    assert str(first.value) == str(second.value)
    assert " at 0x" not in str(first.value)


def test_a_bomb_is_refused_before_it_is_unpacked():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        )

    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    )
    with pytest.raises(TooLargeImageError, match="pixels"):
        images.decode(bomb)
    with pytest.raises(TooLargeImageError, match="1200 pixels|40x30"):
        images.decode(encoded(), max_pixels=1000)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(form: str):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(buffer, format=form, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        assert opened.n_frames == 3
    pixels = images.to_pixels(images.decode(buffer.getvalue()))
    assert (pixels == (255, 0, 0)).all()
    assert pixels.shape == (8, 16, 3)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (33, 1), (3300, 100)])
def test_an_image_too_long_to_be_resized_is_refused(size: tuple[int, int]):
    with pytest.raises(TooLargeImageError, match=f"{size[0]}x{size[1]} pixels, one side more than"):
        images.decode(encoded(size=size, compress_level=1))


def test_the_smallest_and_the_longest_images_are_read():
    for size in ((1, 1), (32, 1), (1, 32)):
        assert images.decode(encoded(size=size)).size == size


def test_want_of_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch):
    def hungry(_: object) -> None:
        raise MemoryError

    content = encoded(format="JPEG")
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", hungry)
    with pytest.raises(MemoryError):
        images.decode(content)


@settings(deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from(["", "JPEG", "PNG", "WEBP", "GIF", "BMP"]), st.data()
)
def test_any_bytes_give_an_image_or_a_reason(noise: bytes, form: str, data: st.DataObject):
    """Bytes of no kind, and images with a part replaced or cut off."""
    content = noise
    if form:
        whole = encoded(format=form, size=(20, 15))
        at = data.draw(st.integers(0, len(whole)))
        content = whole[:at] + noise + whole[at + data.draw(st.integers(0, 50)) :]
    try:
        image = images.decode(content)
    except UnreadableImageError as error:
        answer = str(error)
    else:
        answer = image.mode
    assert answer == "RGB" or len(answer) > 3


def test_png_is_lossless():
    pixels = np.random.default_rng(1).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    assert (images.to_pixels(images.decode(images.encode_png(pixels))) == pixels).all()
