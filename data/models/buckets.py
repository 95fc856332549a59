"""The sizes to which images of several aspects are cut, and which of them fits a pair best."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from data.images import Size

SDXL_RESOLUTION = 1024
SDXL = tuple(
    Size(width, height)
    for height, width in (
        (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
        (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
        (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
        (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768),
        (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576),
        (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
    )
)  # fmt: skip
"""The sizes that SDXL was trained in (Podell et al. 2023, appendix I)."""

Images = Int[np.ndarray, "pair 2 2"]
"""Height and width of both images of each pair, in pixels."""


def free_sizes(side: int, step: int, aspect: float) -> tuple[Size, ...]:
    """Sizes of no more than side x side pixels whose sides are multiples of `step`.

    For each shorter side the longer one is the greatest that keeps to the area; the longer is at
    most `aspect` times the shorter. They are ordered from the tallest to the widest; `side` itself
    is a multiple of `step`, so that the square is among them.
    """
    shorts = range(step, side + 1, step)
    sizes = [(short, side * side // short // step * step) for short in shorts]
    tall = [Size(short, long) for short, long in sizes if long <= aspect * short]
    wide = [Size(size.height, size.width) for size in reversed(tall) if size.width != size.height]
    return (*tall, *wide)


def fraction_kept(images: Images, size: Size) -> Float[np.ndarray, "pair 2"]:
    """The fraction of each image's area that is left when it is cut to a size, in (0, 1]."""
    aspect, wanted = images[..., 1] / images[..., 0], size.width / size.height
    kept: np.ndarray = np.minimum(aspect, wanted) / np.maximum(aspect, wanted)
    return kept


def best_sizes(images: Images, sizes: Sequence[Size]) -> Int[np.ndarray, " pair"]:
    """The index of the size that fits each pair best: that which cuts least of the worse image.

    Of sizes that are equal in this, it is the one that cuts least of both together, and then the
    first. (Least of both together alone would keep one image whole and cut most of the other.)
    """
    best = np.zeros(len(images), np.int64)
    worst, total = np.zeros((2, len(images)))
    for index, size in enumerate(sizes):
        kept = fraction_kept(images, size)
        least, both = kept.min(axis=1), kept.sum(axis=1)
        better = (least > worst) | ((least == worst) & (both > total))
        best[better], worst[better], total[better] = index, least[better], both[better]
    return best
