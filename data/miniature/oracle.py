"""The judge that never votes: does an image show what its prompt asks for?

It looks at the image alone and needs no training. The border gives the background's colour, the
pixels that differ from it give the shape; colours are compared through a table of looks, so that a
washed-out or dim image is not a wrong one; the shape is compared with drawn ones.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from data.miniature import scenes
from data.miniature.scenes import Mask, Pixels

FloatArray = NDArray[np.float32]

_MIDDLE = scenes.SIDE / 2
_BORDER = 3
"""Width in pixels of the frame that no shape reaches."""
_GRID = 24
"""Side of the grid on which outlines are compared."""
_REACH = 1.35
"""Half the side of the compared window, in radii of a disc of the shape's area."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What stands out in an image."""

    paper: FloatArray
    """Colour of the background, RGB in 0 to 255."""
    ink: FloatArray
    """Colour of the shape."""
    mask: Mask
    """How much each pixel belongs to the shape, in [0, 1]."""
    area: float
    """Pixels that the shape covers."""
    x: float
    y: float


def oracle(pixels: Pixels, prompt: str) -> float:
    """How much of the prompt the image shows: the mean of its five attributes, in [0, 1]."""
    return float(np.mean(list(attributes(pixels, prompt).values())))


def attributes(pixels: Pixels, prompt: str) -> dict[str, float]:
    """How clearly the image shows each attribute asked for; above 0.5 is right, 1 beyond doubt."""
    wanted = scenes.parse(prompt)
    seen = look_at(pixels)
    if seen is None:
        return dict.fromkeys(scenes.ATTRIBUTES, 0.0)
    ink, paper = _colour_scores(seen)
    return {
        "size": _size_score(seen, wanted),
        "colour": ink[wanted.colour],
        "shape": _shape_scores(seen)[wanted.shape],
        "place": _place_score(seen, wanted.place),
        "background": paper[wanted.background],
    }


def look_at(pixels: Pixels) -> Seen | None:
    """Tell shape from background; None when nothing stands out."""
    image = pixels.astype(np.float32)
    edge = np.ones(image.shape[:2], bool)
    edge[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    paper = np.median(image[edge], axis=0)
    away = np.linalg.norm(image - paper, axis=-1)
    strong = np.partition(away.ravel(), -60)[-60:].mean()
    if strong < 10:
        return None
    core = away > 0.75 * strong
    ink = np.median(image[core], axis=0)
    axis = ink - paper
    cover = ((image - paper) @ axis) / max(float(axis @ axis), 1.0)
    mask = np.where(cover > 0.25, cover, 0).clip(0, 1).astype(np.float32)
    area = float(mask.sum())
    rows, columns = np.indices(mask.shape)
    return Seen(
        paper,
        ink,
        mask,
        area,
        float((mask * columns).sum() / area) + 0.5,
        float((mask * rows).sum() / area) + 0.5,
    )


def _clarity(wanted: float, best_other: float, unit: float) -> float:
    """How clearly `wanted` is nearer than `best_other`, as a number in [0, 1]; 0.5 is a draw."""
    return float(1 / (1 + np.exp(np.clip(-(best_other - wanted) / unit, -50, 50))))


@cache
def _colour_table() -> tuple[FloatArray, tuple[tuple[str, str], ...]]:
    """Shape and background colours under many looks: pair x look x 6."""
    names = tuple((a, b) for a, b in product(scenes.COLOURS, scenes.COLOURS) if a != b)
    flat = np.array([scenes.COLOURS[a] + scenes.COLOURS[b] for a, b in names], np.float32).reshape(
        -1, 2, 3
    )
    looks = []
    for saturation, contrast, light in product(
        (1.0, 0.75, 0.5, 0.3), (1.0, 0.8, 0.6, 0.45), (-25, 0, 25)
    ):
        grey = (flat @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        toned = 127.5 + contrast * (grey + saturation * (flat - grey) - 127.5) + light
        looks.append(toned.clip(0, 255).reshape(len(names), 6))
    return np.stack(looks, axis=1), names


def _colour_scores(seen: Seen) -> tuple[dict[str, float], dict[str, float]]:
    """Clarity of each colour as the shape's, and as the background's."""
    table, names = _colour_table()
    pair = np.concatenate([seen.ink, seen.paper]).astype(np.float32)
    gaps = np.linalg.norm(table - pair, axis=-1).min(axis=1)
    ink = _nearest(
        {
            c: float(min(g for g, n in zip(gaps, names, strict=True) if n[0] == c))
            for c in scenes.COLOURS
        }
    )
    paper = _nearest(
        {
            c: float(min(g for g, n in zip(gaps, names, strict=True) if n[1] == c))
            for c in scenes.COLOURS
        }
    )
    return ink, paper


def _nearest(gaps: dict[str, float]) -> dict[str, float]:
    return {
        name: _clarity(gap, min(other for key, other in gaps.items() if key != name), 8.0)
        for name, gap in gaps.items()
    }


@cache
def _outline_table() -> tuple[FloatArray, tuple[str, ...]]:
    """Each shape's outline on the comparing grid, drawn sharp and blurred."""
    rows = []
    for shape in scenes.SHAPES:
        for radius in scenes.SIZES.values():
            mask = scenes.shape_mask(shape, radius, _MIDDLE, _MIDDLE)
            rows.append(_outline(mask, float(mask.sum()), _MIDDLE, _MIDDLE))
    return np.stack(rows), tuple(np.repeat(scenes.SHAPES, len(scenes.SIZES)))


def _outline(mask: Mask, area: float, x: float, y: float) -> FloatArray:
    """The mask resampled around its middle so that every shape has the same area."""
    half = _REACH * np.sqrt(area / np.pi) * np.linspace(-1, 1, _GRID)
    across, down = x - 0.5 + half, y - 0.5 + half
    return _sample(mask, down, across).ravel()


def _sample(mask: Mask, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> FloatArray:
    """Bilinear values of the mask at rows x columns; 0 outside."""
    padded = np.pad(mask, 1)
    r = rows.clip(-1, mask.shape[0]) + 1
    c = columns.clip(-1, mask.shape[1]) + 1
    r0, c0 = np.minimum(r.astype(int), mask.shape[0]), np.minimum(c.astype(int), mask.shape[1])
    dr, dc = (r - r0)[:, None], (c - c0)[None, :]
    top = padded[np.ix_(r0, c0)] * (1 - dc) + padded[np.ix_(r0, c0 + 1)] * dc
    bottom = padded[np.ix_(r0 + 1, c0)] * (1 - dc) + padded[np.ix_(r0 + 1, c0 + 1)] * dc
    values: FloatArray = (top * (1 - dr) + bottom * dr).astype(np.float32)
    return values


def _shape_scores(seen: Seen) -> dict[str, float]:
    """Clarity of each shape by the overlap of outlines (intersection over union)."""
    table, names = _outline_table()
    own = _outline(seen.mask, seen.area, seen.x, seen.y)
    overlap = np.minimum(table, own).sum(1) / np.maximum(table, own).sum(1)
    gaps = dict.fromkeys(scenes.SHAPES, 0.0)
    for name, value in zip(names, overlap, strict=True):
        gaps[name] = max(gaps[name], float(value))
    return {
        name: _clarity(-value, -max(v for key, v in gaps.items() if key != name), 0.06)
        for name, value in gaps.items()
    }


def _size_score(seen: Seen, wanted: scenes.Scene) -> float:
    """Clarity of the wanted size, from the area that the shape would have in either size."""
    shape = max(_shape_scores(seen).items(), key=lambda item: item[1])[0]
    gaps = {
        size: abs(
            float(np.log(seen.area / scenes.shape_mask(shape, radius, _MIDDLE, _MIDDLE).sum()))
        )
        for size, radius in scenes.SIZES.items()
    }
    other = next(size for size in gaps if size != wanted.size)
    return _clarity(gaps[wanted.size], gaps[other], 0.25)


def _place_score(seen: Seen, wanted: str) -> float:
    gaps = {name: float(np.hypot(seen.x - x, seen.y - y)) for name, (x, y) in scenes.PLACES.items()}
    return _clarity(gaps[wanted], min(gap for name, gap in gaps.items() if name != wanted), 2.0)
