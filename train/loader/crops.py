"""How the images of a run are cut and scaled to its sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from data.images import Size
from data.models.buckets import Images, best_sizes, fraction_kept


def image_sizes(table: pa.Table) -> Images:
    """Height and width of both images of each pair of a label set, in pixels."""
    names = (f"{length}_{side}" for side in (0, 1) for length in ("height", "width"))
    columns = [table[name].to_numpy().astype(np.int64) for name in names]
    return np.stack(columns, axis=1).reshape(-1, 2, 2)


def choose_sizes(table: pa.Table, sizes: Sequence[Size]) -> Int[np.ndarray, " pair"]:
    """The size that each pair's images are cut to, as index into `sizes`."""
    if len(sizes) == 1:
        return np.zeros(table.num_rows, np.int64)
    return best_sizes(image_sizes(table), sizes)


@dataclass(frozen=True, slots=True)
class Cuts:
    """What is done to images to bring them to their sizes."""

    size: Int[np.ndarray, " pair"]
    """Each pair's size, as index."""
    fraction: Float[np.ndarray, "pair 2"]
    """The fraction of each image's area that is cut off, in [0, 1)."""
    scale: Float[np.ndarray, "pair 2"]
    """The factor of each image's sides; above 1 they are enlarged."""

    def __str__(self) -> str:
        """The cuts and factors in words."""
        if not self.fraction.any():
            cut = "no image cut"
        else:
            cut = f"{self.fraction.mean():.1%} of the images' area cut"
        least, middle, most = np.quantile(self.scale, (0, 0.5, 1))
        scaled = (
            f"{least:.2f} to {most:.2f} (median {middle:.2f})" if least < most else f"{least:.2f}"
        )
        return f"{cut}, sides scaled by {scaled}"


def cuts(images: Images, sizes: Sequence[Size]) -> Cuts:
    """Cut each pair's images to the one of these sizes that fits them best."""
    size = best_sizes(images, sizes)
    fraction, scale = np.zeros((2, len(images), 2))
    for index in np.unique(size).tolist():
        ours, target = size == index, sizes[index]
        fraction[ours] = 1 - fraction_kept(images[ours], target)
        scale[ours] = np.maximum(
            target.height / images[ours, :, 0], target.width / images[ours, :, 1]
        )
    return Cuts(size, fraction, scale)


def describe_cuts(
    table: pa.Table, sizes: Sequence[Size], others: Sequence[Size], unit: int
) -> list[str]:
    """Lines for the terminal: what is cut and scaled, and what it would be with other sizes.

    `others` are the square where there are buckets, and buckets where there are none; they may be
    empty.
    """
    images = image_sizes(table)
    ours = cuts(images, sizes)
    if len(sizes) == 1:
        line = f"squares of {sizes[0]}: {ours}"
        if len(others) > 1 and ours.fraction.any():
            fraction = cuts(images, others).fraction.mean()
            line += f"; with buckets=free {fraction:.1%} would be cut (docs/buckets.md)"
        return [line]
    square = cuts(images, others)
    counts = np.bincount(ours.size, minlength=len(sizes))
    present = np.flatnonzero(counts)
    common = present[np.argsort(-counts[present], kind="stable")[:3]]
    most = ", ".join(f"{sizes[index]} {counts[index] / len(images):.0%}" for index in common)
    lines = [
        f"buckets: {len(present)} of {len(sizes)} sizes have pairs ({most}) · {ours}",
        f"as squares of {others[0]} they would have {square}",
    ]
    if (rare := counts[present] < unit).any():
        pairs = int(counts[present][rare].sum())
        lines.append(
            f"{pairs} pairs of {int(rare.sum())} sizes fill no unit of {unit} in an epoch; they "
            "wait until later ones complete it"
        )
    return lines
