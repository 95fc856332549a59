"""Pictures of the scoring pass -> VAE latents beside the scores (`data/latents.py` says how).

Within a pair shard each distinct picture is encoded once, as it passes by. What the VAE made of it
goes to a nameless scratch file, not to memory, and at the shard's end is put in the pairs' order.
The VAE sees only pictures of one shard at a time, in their order, so a shard's file is the same
whatever else the run did before.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from data.latents import GROUP_ROWS, LatentFormat, write_groups
from data.tables import Status
from label.config import Dtype
from label.metrics.passes import Batch, Clock, halving
from label.metrics.tower import DTYPES
from label.prepare import Fit, View


class Encoder:
    """A VAE's encoder, ready to make latents of a format."""

    def __init__(self, model: Path, form: LatentFormat, device: torch.device, batch: int) -> None:
        from diffusers import AutoencoderKL  # takes seconds, and only some runs ask for latents
        from diffusers.utils import logging

        logging.disable_progress_bar()
        dtype = DTYPES[Dtype(form.compute)]
        self.form, self.batch, self._device = form, Batch(batch), device
        self._vae = AutoencoderKL.from_pretrained(
            model, subfolder="vae", torch_dtype=dtype, use_safetensors=True
        )
        self._vae.to(device).eval().requires_grad_(requires_grad=False)
        self._vae.decoder = None  # half of the weights, and not needed

    def __call__(self, pictures: np.ndarray) -> Float[Tensor, "image facing moment c h w"]:
        """Latents of square pictures (image, side, side, 3) uint8, in the format kept on disk.

        Axis `facing` has the picture and, where the format keeps it, its mirror image; `moment`
        the mean and, where kept, the standard deviation.
        """
        return halving(self._encode, pictures, self.batch)

    @torch.inference_mode()
    def _encode(self, pictures: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(pictures).to(self._device).permute(0, 3, 1, 2)
        signed = pixels.to(self._vae.dtype) / 127.5 - 1
        facings = [signed, signed.flip(3)] if self.form.flip else [signed]
        return torch.stack([self._moments(facing) for facing in facings], 1).cpu()

    def _moments(self, signed: Tensor) -> Tensor:
        found = self._vae.encode(signed).latent_dist
        kept = [found.mean, found.std] if self.form.moments else [found.mean]
        return torch.stack(kept, 1).to(DTYPES[Dtype(self.form.dtype)])


class PairPictures(NamedTuple):
    """A row of a set: which pair, what its pictures are, what is known of them."""

    pair_id: str
    pictures: tuple[bytes, bytes]
    """Their `image_key`s."""
    status: Status


class ShardLatents:
    """The latents of one pair shard, picture by picture and then row by row.

    Use as a context: what is on the scratch file is gone at the end.
    """

    def __init__(self, encoder: Encoder, folder: Path, clock: Clock) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.view = View(Fit.SQUARE, encoder.form.size)
        self._encoder, self._clock = encoder, clock
        self._record = encoder.form.bytes * (1 + encoder.form.flip)
        self._scratch = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._places: dict[bytes, int | None] = {}
        """Picture -> number of its record; None where its latents are not finite."""
        self._num_records = 0
        self._waiting: list[tuple[bytes, np.ndarray]] = []

    def __enter__(self) -> "ShardLatents":
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    def take(self, key: bytes, picture: np.ndarray) -> None:
        """Take a picture, named by its `image_key`, as `view` prepared it; twice is once."""
        if key in self._places:
            return
        self._places[key] = None
        self._waiting.append((key, picture))
        if len(self._waiting) >= self._encoder.batch.size:
            self._encode()

    def write(self, path: Path, rows: Iterable[PairPictures], settings: Mapping[str, Any]) -> None:
        """Write the shard's file, row for row; a bad row has nulls."""
        if self._waiting:
            self._encode()
        self._scratch.flush()
        write_groups(path, self._encoder.form.schema, self._tables(iter(rows)), settings)

    def _encode(self) -> None:
        keys, pictures = zip(*self._waiting, strict=True)
        self._waiting = []
        with self._clock.measure("latents"):
            latents = self._encoder(np.stack(pictures))
            finite = latents.isfinite().flatten(1).all(1).tolist()
            for key, latent, good in zip(keys, latents, finite, strict=True):
                if good:
                    self._scratch.write(latent.contiguous().view(torch.uint8).numpy().tobytes())
                    self._places[key] = self._num_records
                    self._num_records += 1

    def _tables(self, rows: Iterator[PairPictures]) -> Iterator[pa.Table]:
        """The rows, a row group at a time."""
        schema = self._encoder.form.schema
        while group := list(islice(rows, GROUP_ROWS)):
            yield pa.Table.from_pylist([self._row(row) for row in group], schema=schema)

    def _row(self, row: PairPictures) -> dict[str, Any]:
        status, each = row.status, self._encoder.form.bytes
        if status is Status.OK and any(self._places[key] is None for key in row.pictures):
            status = Status.NOT_FINITE_LATENT
        found: dict[str, Any] = {"pair_id": row.pair_id, "status": str(status)}
        if status is Status.OK:
            for side, key in enumerate(row.pictures):
                record = self._read(key)
                found |= {f"latent_{side}": record[:each], f"flipped_{side}": record[each:]}
        return found

    def _read(self, key: bytes) -> bytes:
        place = self._places[key]
        assert place is not None
        return os.pread(self._scratch.fileno(), self._record, place * self._record)
