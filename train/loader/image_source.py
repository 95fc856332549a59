"""Reads the images of pairs from row groups of the pair files, and decodes and crops them.

Stage one's latents, which may be read instead, are in `train/loader/latent_source.py`.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data.artifacts.atomic import ShardError
from data.images import Size, UnreadableImageError, decode, fit
from data.pairs.schema import PairShard, PairSource

Pixels = UInt8[Tensor, "pair height width 3"]
Latents = Float[Tensor, "pair facing moment channel height_8 width_8"]
"""The VAE's output, before the model's scaling. `facing` has the image and, if images are mirrored,
its mirror image; `moment` the posterior's mean and, if it was kept, its deviation."""

Images = Pixels | Latents
"""One image of each pair: pixels, or their latents."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The unit of reading: one row group of one pair file."""

    shard: PairShard
    index: int
    bytes: int
    """Uncompressed, images included."""


@runtime_checkable
class PairImages(Protocol):
    """A source of the images of pairs, in row groups that are read whole."""

    @property
    def group(self) -> np.ndarray:
        """Each pair's row group; none has pairs of two row groups of the pair files."""

    def bytes_of(self, group: int) -> int:
        """Memory of a row group."""

    def read(self, group: int) -> Any:
        """Read a row group into memory."""

    def row(self, pair: int, group: Any) -> Any:
        """The part of a row group that a pair needs; it keeps nothing else of it in memory."""

    def take(
        self,
        pairs: np.ndarray,
        labels: Sequence[Mapping[str, Any]],
        rows: Sequence[Any],
        threads: Executor,
    ) -> tuple[Images, Images]:
        """Winners and losers of pairs of one size, which have these labels and rows."""


@dataclass(frozen=True, slots=True)
class PairFileImages:
    """The images in the pair files that were labelled."""

    source: PairSource
    groups: tuple[RowGroup, ...]
    group: np.ndarray
    """Each pair's row group, as index into `groups`."""
    row_of: np.ndarray
    """Each pair's row in its row group."""
    size: np.ndarray
    """The size that each pair's images are cut to, as index into `sizes`."""
    sizes: tuple[Size, ...]

    def bytes_of(self, group: int) -> int:
        """Uncompressed bytes of the row group."""
        return self.groups[group].bytes

    def read(self, group: int) -> pa.Table:
        """Read the row group with the columns of `data.pairs.schema.PAIR`."""
        row_group = self.groups[group]
        return self.source.read_row_group(row_group.shard, row_group.index)

    def row(self, pair: int, group: pa.Table) -> Mapping[str, Any]:
        """The pair's columns, with both images encoded."""
        columns: Mapping[str, Any] = group.slice(int(self.row_of[pair]), 1).to_pylist()[0]
        return columns

    def take(
        self,
        pairs: np.ndarray,
        labels: Sequence[Mapping[str, Any]],
        rows: Sequence[Mapping[str, Any]],
        threads: Executor,
    ) -> tuple[Images, Images]:
        """Decode both images of each pair.

        Raises:
            ShardError: An image is not the one that was labelled, or is no longer readable.
        """
        contents: list[tuple[bytes, str]] = []
        for index, label, row in zip(pairs.tolist(), labels, rows, strict=True):
            shard = self.groups[int(self.group[index])].shard
            contents += _winner_loser(row, label, shard.name)
        size = self.sizes[int(self.size[pairs[0]])]
        pixels = np.stack(list(threads.map(_cut, contents, [size] * len(contents))))
        both = torch.from_numpy(pixels).view(len(pairs), 2, *pixels.shape[1:])
        return both[:, 0], both[:, 1]


def _winner_loser(
    pair: Mapping[str, Any], label: Mapping[str, Any], file: str
) -> list[tuple[bytes, str]]:
    """Return the encoded winner and loser of a pair, each with a name for messages."""
    where = f"pair {label['pair_id']} (row {label['row']} of {file})"
    if (pair["uid_0"], pair["uid_1"]) != (label["image_0"], label["image_1"]):
        raise ShardError(
            f"{where} was labelled with the images {label['image_0']} and {label['image_1']}, "
            f"but the file has {pair['uid_0']} and {pair['uid_1']} there; "
            "give the pairs that were labelled (pairs.root=...), or label again"
        )
    images = [(pair[f"image_{side}"] or b"", side) for side in winner_first(label)]
    return [(image, f"image {side} of {where}") for image, side in images]


def winner_first(label: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of a pair's images, the winner's first."""
    return (0, 1) if label["winner"] == 0 else (1, 0)


def _cut(content: tuple[bytes, str], size: Size) -> np.ndarray:
    encoded, name = content
    try:
        return fit(decode(encoded), size)
    except UnreadableImageError as error:
        raise ShardError(
            f"{name} cannot be read any more ({error}), though it was scored; "
            "the pair file, or the image it names, has changed since it was labelled: label again"
        ) from error
