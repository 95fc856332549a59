"""VAE latents of a pair set on disk: their identity, their format, and how they are written.

A set `latents/<vae>-<size>/` has one file per pair shard, row for row beside it; one with aspect
buckets is `latents/<vae>-<size>-<digest of the sizes>/`, and its rows say which size they have. A
latent is the VAE's own number, before the model's scaling and shift; a row's bytes are its mean,
followed by its standard deviation where both are kept, each (channel, height, width) in
little-endian order.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.artifacts.atomic import ShardError, partial_path, publish
from data.artifacts.config_diff import Settings
from data.artifacts.manifest import Manifest, read_manifest
from data.artifacts.parquet_io import SETTINGS_KEY
from data.artifacts.schemas import latents as schema_of
from data.images import Size

KIND = "latents"
GROUP_ROWS = 64
"""Rows of a row group: 4 MiB of 512-pixel pairs in fp16, small enough to keep many open."""

CROP = "shortest side bilinear on uint8, center crop"
"""What `images.fit` does; of several sizes the side that fits the size is the shortest."""

BYTES_OF = {"fp16": 2, "bf16": 2, "fp32": 4}
"""Number formats on disk, and bytes of a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFormat:
    """Everything apart from the pairs that decides the bytes of a set."""

    vae: str
    """SHA-256 of the VAE's weights."""
    size: int
    """Side of the square images in pixels."""
    shape: tuple[int, int, int]
    """Channels, height and width of a square image's latent."""
    dtype: str
    """Format on disk: fp16, bf16 or fp32."""
    moments: bool
    """Mean and standard deviation of the VAE's posterior; else the mean alone."""
    flip: bool
    """Whether the mirrored images' latents are kept, too; a mirrored latent is none of them."""
    compute: str
    """Format in which the VAE ran."""
    buckets: tuple[Size, ...] = ()
    """The sizes of images, of which each pair has that which fits it best; none are squares."""

    @property
    def name(self) -> str:
        """The set's folder below `latents/`."""
        return set_name(self.vae, self.size, self.buckets)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of images."""
        return self.buckets or (Size(self.size, self.size),)

    def shape_of(self, size: Size) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image of a size."""
        factor = self.size // self.shape[1]
        return self.shape[0], size.height // factor, size.width // factor

    def bytes_of(self, size: Size) -> int:
        """Bytes of one image of a size in one orientation."""
        return (1 + self.moments) * math.prod(self.shape_of(size)) * BYTES_OF[self.dtype]

    @property
    def bytes(self) -> int:
        """Bytes of one image in one orientation, at most."""
        return max(map(self.bytes_of, self.sizes))

    @property
    def record(self) -> int:
        """Bytes of one image in all orientations that are kept, at most."""
        return self.bytes * (1 + self.flip)

    @property
    def schema(self) -> pa.Schema:
        """The columns of the set's files."""
        return schema_of(None if self.buckets else self.bytes, flip=self.flip)

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON, for footers and the manifest; equal settings give equal bytes."""
        buckets = [[size.width, size.height] for size in self.buckets]
        return {
            "kind": KIND,
            "vae": self.vae,
            "size": self.size,
            "crop": CROP,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "moments": self.moments,
            "flip": self.flip,
            "compute": self.compute,
        } | ({"buckets": buckets} if buckets else {})

    @classmethod
    def from_settings(cls, settings: Settings) -> "LatentFormat":
        """The format that a manifest speaks of.

        Raises:
            ValueError: The images were cut in another way, or a value is missing.
        """
        try:
            names = [name for name in cls.__slots__ if name not in ("shape", "buckets")]
            if settings["crop"] != CROP:
                raise ValueError(f"its images were cut by {settings['crop']!r}, not {CROP!r}")
            values = {name: settings[name] for name in names}
            shape, buckets = settings["shape"], settings.get("buckets", [])
        except KeyError as error:
            raise ValueError(f"its settings lack {error}") from error
        sizes = [*shape, values["size"]] if isinstance(shape, list) else []
        sides = [side for size in buckets for side in size] if isinstance(buckets, list) else [0]
        flags = [values["moments"], values["flip"]]
        if (
            len(sizes) != 4
            or not all(type(size) is int and size > 0 for size in (*sizes, *sides))
            or len(sides) != 2 * len(buckets)
            or not all(isinstance(flag, bool) for flag in flags)
            or not all(isinstance(values[name], str) for name in ("vae", "dtype", "compute"))
            or values["dtype"] not in BYTES_OF
        ):
            raise ValueError(f"its settings contradict themselves: {dict(settings)}")
        pairs = tuple(Size(*size) for size in buckets)
        return cls(shape=(shape[0], shape[1], shape[2]), buckets=pairs, **values)

    def __str__(self) -> str:
        """The format in words: `4x64x64 fp16 mean, 32 KiB an image`."""
        what = "mean and std" if self.moments else "mean"
        both = ", both orientations" if self.flip else ""
        shape, each = "x".join(map(str, self.shape)), f"{self.record / 1024:g} KiB an image"
        if self.buckets:
            shape, each = f"{len(self.buckets)} sizes, {shape} and less,", f"up to {each}"
        return f"{shape} {self.dtype} {what}{both}, {each}"


def set_name(vae: str, size: int, buckets: Sequence[Size] = ()) -> str:
    """The folder of the latents of a VAE, given by its SHA-256, at a size in pixels."""
    name = f"{vae[:12]}-{size}"
    if not buckets:
        return name
    return f"{name}-{sha256(' '.join(map(str, buckets)).encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class LatentSet:
    """A complete set."""

    folder: Path
    manifest: Manifest
    form: LatentFormat


def read_set(folder: Path) -> LatentSet | None:
    """The set in a folder, or None when it is not (yet) complete.

    Raises:
        ShardError: The manifest is damaged, of another kind, or of another way to make latents.
    """
    manifest = read_manifest(folder, KIND)
    if manifest is None:
        return None
    try:
        form = LatentFormat.from_settings(manifest.settings)
    except ValueError as error:
        raise ShardError(
            f"{folder} has latents that cannot be used: {error}; delete it and run `make labels` "
            "again, or set train.latents=never"
        ) from error
    if form.name != folder.name:
        raise ShardError(f"{folder} has the manifest of {form.name}; delete the folder")
    return LatentSet(folder, manifest, form)


class GroupWriter:
    """Writes a file of latents whole or not at all, a row group at a time.

    Latents are stored as they are, without compression, dictionary or statistics: nothing is
    gained by any, and reading is 5 to 10 times faster. Pages have checksums.
    """

    def __init__(self, path: Path, schema: pa.Schema, settings: Settings) -> None:
        """`settings` go into the footer."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._partial = path, partial_path(path)
        footer = {SETTINGS_KEY: json.dumps(settings, sort_keys=True).encode()}
        kinds = pa.types.is_fixed_size_binary, pa.types.is_binary
        blobs = [field.name for field in schema if any(kind(field.type) for kind in kinds)]
        plain = [name for name in schema.names if name not in blobs]
        self._writer = pq.ParquetWriter(
            self._partial,
            schema.with_metadata(footer),
            compression={name: "none" if name in blobs else "zstd" for name in schema.names},
            use_dictionary=plain,
            write_statistics=plain,
            write_page_checksum=True,
        )

    def write(self, group: pa.Table) -> None:
        """Add a row group."""
        self._writer.write_table(group, row_group_size=GROUP_ROWS)

    def close(self) -> None:
        """Finish the file, which appears only now; one that is there already stays."""
        self._writer.close()
        publish(self._partial, self._path, keep_existing=True)
