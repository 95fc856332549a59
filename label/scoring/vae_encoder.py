"""Images of the scoring pass -> VAE latents beside the scores (see `data/artifacts/latents.py`).

To the pass the VAE is one more network that embeds images: each distinct one is encoded once, in
batches of one shape. A shard's file grows by row groups as its pairs are computed.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from torch import Tensor

from data.artifacts.config_diff import Settings
from data.artifacts.latents import GROUP_ROWS, GroupWriter, LatentFormat
from data.artifacts.readable import read_json_object
from data.artifacts.schemas import Status
from data.devices import Dtype
from data.images import Size
from data.models.autoencoder import encode_moments
from data.models.buckets import best_sizes
from data.models.folder import check_part
from data.models.vae_config import USUAL
from label.metrics.preprocessing import Cut
from label.scoring.batching import Batch
from label.scoring.embedding_cache import CachedImage


class VaeEncoder:
    """The encoder of a VAE, for latents of one format."""

    def __init__(self, model: Path, form: LatentFormat, device: torch.device, batch: int) -> None:
        import diffusers  # takes seconds, and only some runs write latents
        from diffusers.utils import logging

        logging.disable_progress_bar()
        what = f"model.path={model}"
        name = read_json_object(model / "vae" / "config.json", what).get("_class_name", USUAL)
        check_part(model, "vae", what, ["diffusers", name])
        dtype = Dtype(form.compute).torch
        self.form, self.batch, self._device = form, Batch(batch), device
        self.cuts = tuple(map(Cut, form.sizes))
        self.dtype = Dtype(form.dtype).torch
        self._vae = getattr(diffusers, name).from_pretrained(
            model, subfolder="vae", torch_dtype=dtype, use_safetensors=True
        )
        self._vae.to(device).eval().requires_grad_(requires_grad=False)
        self._vae.decoder = torch.nn.Identity()  # half of the weights, and not needed

    @property
    def num_bytes(self) -> int:
        """Size of an image's latents, at most."""
        return self.form.record

    def key_of(self, cut: Cut) -> tuple[int, Cut]:
        """Names latents among the embeddings of an image."""
        return id(self), cut

    def cut_of(self, left: Size | None, right: Size | None) -> Cut | None:
        """How the images of a pair are cut that have these sizes; None where one cannot be read.

        Where all images become squares, no size needs to be known.
        """
        if len(self.cuts) == 1:
            return self.cuts[0]
        if left is None or right is None:
            return None
        return self.cuts[_best(self.form.sizes, left, right)]

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> UInt8[Tensor, "image byte"]:
        """Images of one size (height, width, 3), uint8 -> the bytes of their latents in the format.

        First those of the image, then, where they are kept, of its mirror image; in each the
        mean and, where it is kept, the standard deviation.
        """
        pixels = torch.from_numpy(np.stack(images)).to(self._device).permute(0, 3, 1, 2)
        signed = pixels.to(self._vae.dtype) / 127.5 - 1
        facings = [signed, signed.flip(3)] if self.form.flip else [signed]
        latents = torch.stack([self._moments(facing) for facing in facings], 1)
        return latents.contiguous().view(torch.uint8).flatten(1)

    def _moments(self, signed: Tensor) -> Tensor:
        return encode_moments(self._vae, signed)[:, : 1 + self.form.moments].to(self.dtype)


@cache
def _best(sizes: tuple[Size, ...], left: Size, right: Size) -> int:
    images = np.array([[[left.height, left.width], [right.height, right.width]]])
    return int(best_sizes(images, sizes)[0])


def _size(image: CachedImage) -> Size:
    """The size of an image that could be read."""
    processed = image.processed
    assert processed is not None
    assert processed.width is not None
    assert processed.height is not None
    return Size(processed.width, processed.height)


class LatentFile:
    """The latents of a pair shard on their way to the disk."""

    def __init__(self, path: Path, encoder: VaeEncoder, settings: Settings) -> None:
        self._encoder, self._schema = encoder, encoder.form.schema
        self._writer = GroupWriter(path, self._schema, settings)
        self._rows: list[dict[str, Any]] = []
        """Less than a row group."""

    def add(
        self,
        pairs: Sequence[tuple[str, Status]],
        images: Sequence[tuple[CachedImage, CachedImage]],
    ) -> None:
        """Take the next pairs: their names and statuses, and their images with latents."""
        for (name, status), both in zip(pairs, images, strict=True):
            self._rows.append(self._row(name, status, both))
            if len(self._rows) == GROUP_ROWS:
                self._write()

    def close(self) -> None:
        """Finish the file."""
        if self._rows:
            self._write()
        self._writer.close()

    def _row(
        self, name: str, status: Status, images: tuple[CachedImage, CachedImage]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"pair_id": name, "status": str(status)}
        if status is not Status.OK:
            return row
        cut = self._encoder.cut_of(*map(_size, images))
        assert cut is not None
        key, form = self._encoder.key_of(cut), self._encoder.form
        records = [image.embeddings[key].tobytes() for image in images]
        if form.buckets:
            row |= {"width": cut.size.width, "height": cut.size.height}
        if not all(self._is_finite(record) for record in records):
            return row | {"status": str(Status.NOT_FINITE_LATENT)}
        each = form.bytes_of(cut.size)
        for side, record in enumerate(records):
            row |= {f"latent_{side}": record[:each], f"flipped_{side}": record[each:]}
        return row

    def _is_finite(self, record: bytes) -> bool:
        numbers = torch.frombuffer(bytearray(record), dtype=self._encoder.dtype)
        return bool(numbers.isfinite().all())

    def _write(self) -> None:
        self._writer.write(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []
