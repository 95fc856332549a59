"""The miniature world: prompts about shapes, the images they ask for, and what can go wrong.

A prompt names five attributes ("a small red circle at the left on a blue background"). An image
can fail in two ways that do not depend on each other: it shows a wrong attribute (a fault), or it
shows the right one badly (its look: washed out, dim, blurred, grainy).
"""

from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]
"""An image, height x width x RGB."""
Mask = NDArray[np.float32]
"""How much of each pixel the shape covers, height x width in [0, 1]."""
Split = Literal["train", "validation", "test"]

SIDE = 64
"""Height and width of an image in pixels."""
SIZES = {"small": 8.0, "large": 14.5}
"""Radius in pixels of the circle that the shape fits in or equals."""
COLOURS = {
    "red": (220, 35, 35),
    "yellow": (245, 220, 40),
    "green": (35, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 70, 215),
    "purple": (150, 50, 185),
    "white": (248, 248, 248),
    "black": (14, 14, 14),
}
"""Colours of shapes and backgrounds, far apart in hue or lightness."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = {
    "center": (32, 32),
    "left": (19, 32),
    "right": (45, 32),
    "top": (32, 19),
    "bottom": (32, 45),
}
"""Where the shape's middle lies, (x, y) in pixels."""
ATTRIBUTES = ("size", "colour", "shape", "place", "background")
JITTER = 1.5
"""Largest shift of the shape from its place, in pixels."""
_OVERSAMPLING = 4
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a prompt asks for, or what an image shows."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    @property
    def prompt(self) -> str:
        """The scene in words; `parse` reads it back."""
        return (
            f"a {self.size} {self.colour} {self.shape} at the {self.place} "
            f"on a {self.background} background"
        )


@dataclass(frozen=True, slots=True)
class Look:
    """How well an image is made, whatever it shows; the defaults are a perfect print."""

    saturation: float = 1.0
    """0 is grey, 1 the full colours."""
    contrast: float = 1.0
    """0 is flat, 1 the full range."""
    brightness: float = 0.0
    """Added to every channel, as a part of the full range; below 0 is dim."""
    blur: float = 0.0
    """Standard deviation in pixels."""
    noise: float = 0.0
    """Standard deviation of the grain, as a part of the full range."""

    @property
    def appeal(self) -> float:
        """How pleasing the look is, in [0, 1]: vivid, contrasted, sharp and evenly lit."""
        sharp = 1 - min(self.blur / 2.5, 1)
        light = 1 - min(abs(self.brightness) / 0.2, 1)
        vivid, crisp = min(self.saturation, 1), min(self.contrast, 1)
        return 0.35 * vivid + 0.3 * crisp + 0.25 * sharp + 0.1 * light


def parse(prompt: str) -> Scene:
    """Read a prompt of this world back into its scene; ValueError for any other sentence."""
    words = prompt.split()
    if len(words) == 11:
        scene = Scene(words[1], words[2], words[3], words[6], words[9])
        if scene.prompt == prompt and _exists(scene):
            return scene
    raise ValueError(
        f"{prompt!r} is not a prompt of the miniature world; see data/miniature/scenes.py"
    )


def _exists(scene: Scene) -> bool:
    return (
        scene.size in SIZES
        and scene.colour in COLOURS
        and scene.shape in SHAPES
        and scene.place in PLACES
        and scene.background in COLOURS
        and scene.colour != scene.background
    )


def all_scenes() -> list[Scene]:
    """Every scene that a prompt can ask for, in a fixed order."""
    choices = product(SIZES, COLOURS, SHAPES, PLACES, COLOURS)
    return [scene for scene in (Scene(*choice) for choice in choices) if _exists(scene)]


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to for ever; it depends on the words alone."""
    key = int.from_bytes(blake2b(prompt.encode(), digest_size=8).digest(), "little") / 2**64
    return "test" if key < 0.18 else "validation" if key < 0.27 else "train"


def prompts(split: Split) -> list[str]:
    """All prompts of one split, in a fixed order that mixes the attributes."""
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; choose one of {', '.join(get_args(Split))}")
    own = [s.prompt for s in all_scenes() if split_of(s.prompt) == split]
    return sorted(
        own, key=lambda prompt: blake2b(prompt.encode(), digest_size=8, key=b"order").digest()
    )


def choices(attribute: str) -> tuple[str, ...]:
    """The values that one attribute can take."""
    return {
        "size": tuple(SIZES),
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "place": tuple(PLACES),
        "background": tuple(COLOURS),
    }[attribute]


def with_fault(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed to another value; shape and background stay apart."""
    wrong = []
    for value in choices(attribute):
        candidate = replace(scene, **{attribute: value})
        if candidate != scene and _exists(candidate):
            wrong.append(candidate)
    return wrong[int(rng.integers(len(wrong)))]


def with_faults(scene: Scene, rate: float, rng: np.random.Generator) -> Scene:
    """The scene with each attribute made wrong with probability `rate`."""
    for attribute in ATTRIBUTES:
        if rng.random() < rate:
            scene = with_fault(scene, attribute, rng)
    return scene


def draw_look(quality: float, rng: np.random.Generator) -> Look:
    """A random look; `quality` in [0, 1] shifts all of it from poor towards perfect."""
    poor = 1 - np.clip(quality + rng.normal(0, 0.28, 4), 0, 1)
    return Look(
        saturation=float(1.0 - 0.75 * poor[0]),
        contrast=float(1.0 - 0.6 * poor[1]),
        brightness=float(rng.normal(0, 0.02 + 0.1 * poor[2])),
        blur=float(2.4 * poor[3] * (poor[3] > 0.15)),
        noise=float(0.03 * poor[2] * rng.random()),
    )


def shape_mask(shape: str, radius: float, x: float, y: float, side: int = SIDE) -> Mask:
    """Coverage of each pixel by a shape of that radius around (x, y), edges smoothed."""
    canvas = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING), 0)
    pen = ImageDraw.Draw(canvas)
    middle = np.array([x, y]) * _OVERSAMPLING
    radius *= _OVERSAMPLING
    if shape in ("circle", "ring"):
        _disc(pen, middle, radius, 255)
        if shape == "ring":
            _disc(pen, middle, radius * 0.52, 0)
    else:
        for outline in _outlines(shape):
            pen.polygon([tuple(point) for point in middle + radius * outline], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLING), np.float32) / np.float32(255)


def _disc(pen: ImageDraw.ImageDraw, middle: NDArray[np.float64], radius: float, ink: int) -> None:
    (left, top), (right, bottom) = middle - radius, middle + radius
    pen.ellipse((left, top, right, bottom), fill=ink)


def _outlines(shape: str) -> list[NDArray[np.float64]]:
    """Corner points of a shape's parts, for radius 1 around (0, 0)."""
    bar = np.array([[-1, -0.32], [1, -0.32], [1, 0.32], [-1, 0.32]])
    if shape == "square":
        return [np.array([[-0.86, -0.86], [0.86, -0.86], [0.86, 0.86], [-0.86, 0.86]])]
    if shape == "triangle":
        return [np.array([[0, -1.1], [1.1, 0.8], [-1.1, 0.8]])]
    if shape == "cross":
        return [bar, bar[:, ::-1]]
    if shape == "star":
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.2, 0.48)
        return [np.stack([np.cos(turns) * reach, np.sin(turns) * reach], 1)]
    raise ValueError(f"shape is {shape!r}; choose one of {', '.join(SHAPES)}")


def render(scene: Scene, look: Look, rng: np.random.Generator) -> Pixels:
    """Draw the scene; position, radius and shades vary a little from image to image."""
    x, y = np.array(PLACES[scene.place]) + rng.uniform(-JITTER, JITTER, 2)
    mask = shape_mask(scene.shape, SIZES[scene.size] * rng.uniform(0.94, 1.06), x, y)
    shades = rng.normal(0, 5, (2, 3)).astype(np.float32)
    ink, paper = np.array([COLOURS[scene.colour], COLOURS[scene.background]], np.float32) + shades
    flat = paper + mask[..., None] * (ink - paper)
    return apply_look(flat, look, rng)


def apply_look(image: NDArray[np.float32], look: Look, rng: np.random.Generator) -> Pixels:
    """Print an image (values 0 to 255) with the given look."""
    grey = (image @ _LUMA)[..., None]
    toned = grey + look.saturation * (image - grey)
    toned = 127.5 + look.contrast * (toned - 127.5) + 255 * look.brightness
    if look.noise > 0:
        toned = toned + rng.normal(0, 255 * look.noise, toned.shape)
    printed = toned.clip(0, 255).round().astype(np.uint8)
    if look.blur > 0:
        smooth = Image.fromarray(printed).filter(ImageFilter.GaussianBlur(look.blur))
        printed = np.asarray(smooth)
    return printed


@dataclass(frozen=True, slots=True)
class SceneImage:
    """What an imperfect generator made of a prompt, and how it turned out."""

    pixels: Pixels
    scene: Scene
    """What is shown, which is not always what was asked."""
    look: Look
    quality: float
    """How good its generator was on this day, in [0, 1]."""


def imagine(prompt: str, rng: np.random.Generator) -> SceneImage:
    """An image as an imperfect generator makes it: good ones are rarely wrong and look better.

    An attribute is wrong with probability 0.12 on average; quality couples faults and looks, as
    in sets whose images come from generators of unequal strength.
    """
    quality = rng.random()
    scene = with_faults(parse(prompt), 0.24 * (1 - quality), rng)
    look = draw_look(0.35 * quality + 0.65 * rng.random(), rng)
    return SceneImage(render(scene, look, rng), scene, look, quality)
