"""Reads stage one's latents instead of the images: the same pairs, in the same order."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.artifacts.atomic import ShardError
from data.artifacts.latents import LatentSet
from data.artifacts.manifest import FileEntry, part_name
from data.artifacts.parquet_io import read_table
from data.artifacts.schemas import Status
from data.devices import Dtype
from train.loader.crops import choose_sizes
from train.loader.dataset import DecidedPairs
from train.loader.image_source import Images, winner_first

AGAIN = "delete {folder} and run `make labels` again, or set train.latents=never"


@dataclass(frozen=True, slots=True)
class LatentRow:
    """A row group of a latent file, or the part of it that belongs to one row group of pairs."""

    file: str
    index: int
    rows: int


@dataclass(frozen=True, slots=True)
class LatentFiles:
    """The latents of decided pairs."""

    latent_set: LatentSet
    mirrored: bool
    """Whether mirrored latents are read as well."""
    places: tuple[LatentRow, ...]
    group: np.ndarray
    """Each pair's row group, as index into `places`."""
    row_of: np.ndarray
    """Each pair's row in its row group."""
    size: np.ndarray
    """Each pair's size, as index into the sizes of the set."""

    def bytes_of(self, group: int) -> int:
        """Bytes of the latents in the row group."""
        return self.places[group].rows * self.latent_set.form.bytes * (4 if self.mirrored else 2)

    def read(self, group: int) -> pa.Table | dict[str, Tensor]:
        """Column -> latents of all rows of the row group, (row, moment, channel, height, width).

        Those of several sizes stay as they are in the file.

        Raises:
            ShardError: The file is damaged.
        """
        place, form = self.places[group], self.latent_set.form
        path = self.latent_set.folder / place.file
        kinds = ("latent", "flipped") if self.mirrored else ("latent",)
        names = [f"{kind}_{side}" for kind in kinds for side in (0, 1)]
        try:
            file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
            table = file.read_row_group(place.index, columns=names, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ShardError(
                f"{path} cannot be read ({error}); {AGAIN.format(folder=path.parent)}"
            ) from error
        if form.buckets:
            return table
        shape = (table.num_rows, 1 + form.moments, *form.shape)
        dtype = Dtype(form.dtype).torch
        return {name: blob_bytes(table[name]).view(dtype).view(shape) for name in names}

    def row(self, pair: int, group: pa.Table | dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The latents of image 0 and image 1, (facing, moment, channel, height, width)."""
        row, kinds = int(self.row_of[pair]), ("latent", "flipped") if self.mirrored else ("latent",)
        first, second = (
            torch.stack([self._latent(pair, group[f"{kind}_{side}"][row]) for kind in kinds])
            for side in (0, 1)
        )
        return first, second

    def _latent(self, pair: int, value: Tensor | pa.BinaryScalar) -> Tensor:
        """A pair's latent out of a column, (moment, channel, height, width)."""
        if isinstance(value, Tensor):
            return value
        form = self.latent_set.form
        shape = form.shape_of(form.sizes[int(self.size[pair])])
        content = torch.frombuffer(bytearray(value.as_buffer()), dtype=Dtype(form.dtype).torch)
        return content.view(1 + form.moments, *shape)

    def take(
        self,
        pairs: np.ndarray,
        labels: Sequence[Mapping[str, Any]],
        rows: Sequence[tuple[Tensor, Tensor]],
        threads: Executor,
    ) -> tuple[Images, Images]:
        """Winners and losers; there is nothing to decode."""
        ordered = [
            [row[side] for side in winner_first(label)]
            for label, row in zip(labels, rows, strict=True)
        ]
        winner, loser = zip(*ordered, strict=True)
        return torch.stack(winner), torch.stack(loser)


def blob_bytes(column: pa.ChunkedArray) -> Tensor:
    """The bytes of a column of blobs of equal length, (row, byte)."""
    blobs = pa.concat_arrays(column.chunks)
    size = blobs.type.byte_width
    content = np.frombuffer(blobs.buffers()[1], np.uint8)
    start = blobs.offset * size
    ours = content[start : start + len(blobs) * size].reshape(len(blobs), size)
    return torch.from_numpy(ours.copy())  # Arrow's memory must not be written to


def latents_of(latent_set: LatentSet, pairs: DecidedPairs, *, mirrored: bool) -> LatentFiles:
    """Locate the latents of decided pairs.

    Raises:
        ShardError: The set is of other pairs, lacks a file, or has no latents of a decided pair.
    """
    files = {file.name: file for file in latent_set.manifest.files}
    rows = pairs.table["row"].to_numpy()
    names = pairs.table["pair_id"].to_numpy()
    shard_of = np.array([group.shard.index for group in pairs.groups])[pairs.group]
    inside, row, count = (np.zeros(len(rows), np.int64) for _ in range(3))
    form = latent_set.form
    size = choose_sizes(pairs.table, form.sizes)
    lengths = np.array([[one.width, one.height] for one in form.sizes])[size]
    for shard in np.unique(shard_of).tolist():
        ours = np.flatnonzero(shard_of == shard)
        file = files.get(part_name(shard))
        if file is None:
            raise ShardError(
                f"{latent_set.folder} has no {part_name(shard)}: it is of other pairs than the "
                f"labels; "
                f"{AGAIN.format(folder=latent_set.folder)}"
            )
        table = _check(latent_set, file, rows[ours], names[ours])
        if form.buckets:
            _check_sizes(latent_set.folder / file.name, table, rows[ours], lengths[ours])
        ends = np.cumsum(file.row_groups)
        inside[ours] = np.searchsorted(ends, rows[ours], side="right")
        row[ours] = rows[ours] - np.concatenate([[0], ends])[inside[ours]]
        count[ours] = np.array(file.row_groups)[inside[ours]]
    # A row group of latents that spans two row groups of pairs counts twice: each has its turn.
    key = pairs.group * (int(inside.max(initial=0)) + 1) + inside
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    places = (
        LatentRow(part_name(int(shard_of[pair])), int(inside[pair]), int(count[pair]))
        for pair in first
    )
    return LatentFiles(latent_set, mirrored, tuple(places), group, row, size)


def _check(latent_set: LatentSet, file: FileEntry, rows: np.ndarray, names: np.ndarray) -> pa.Table:
    """Check that a file is the one in the manifest, and has these pairs; returns what it says."""
    folder = latent_set.folder
    path = folder / file.name
    if not path.is_file() or path.stat().st_size != file.bytes:
        state = "has another size than its manifest says" if path.is_file() else "is missing"
        raise ShardError(f"{path} {state}; {AGAIN.format(folder=folder)}")
    sizes = ["width", "height"] if latent_set.form.buckets else []
    table = read_table(path, ["pair_id", "status", *sizes])
    if file.rows <= int(rows.max()) or not (table["pair_id"].to_numpy()[rows] == names).all():
        raise ShardError(f"{path} is of other pairs than the labels; {AGAIN.format(folder=folder)}")
    status = table["status"].to_numpy()[rows]
    if (bad := np.flatnonzero(status != str(Status.OK))).size:
        raise ShardError(
            f"pair {names[bad[0]]} (row {rows[bad[0]]} of {path}) has a winner but no latents "
            f"({status[bad[0]]}); {AGAIN.format(folder=folder)}"
        )
    return table


def _check_sizes(path: Path, table: pa.Table, rows: np.ndarray, lengths: np.ndarray) -> None:
    """Check that the latents of pairs, in these rows, have these widths and heights."""
    stored = np.stack([table[name].to_numpy()[rows] for name in ("width", "height")], axis=1)
    if (wrong := np.flatnonzero((stored != lengths).any(axis=1))).size:
        row, (width, height) = wrong[0], lengths[wrong[0]]
        raise ShardError(
            f"row {rows[row]} of {path} has latents of {stored[row][0]:.0f}x{stored[row][1]:.0f} "
            f"pixels, but by its labels the pair's images become {width}x{height}; "
            f"{AGAIN.format(folder=path.parent)}"
        )
