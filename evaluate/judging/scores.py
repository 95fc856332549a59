"""Scores every image with every judge, once, so that the statistics need no model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from data.artifacts import schemas
from data.artifacts.config_diff import differences
from data.artifacts.parquet_io import read_settings, read_table, write_table
from data.images import UnreadableImageError, decode, to_pixels
from generate.image_files import Sample, SamplesError

AGAIN = "delete it and run the same command again, which generates it anew"
"""What to do about an image that cannot be used."""
CHUNK = 2048
"""How many images' bytes are in memory at a time."""


@runtime_checkable
class Scorers(Protocol):
    """The part of `label.scoring.panel.Panel` that judging uses."""

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics, in the order of their columns."""
        ...

    def score(
        self, images: Sequence[bytes], prompts: Sequence[str], *, batch: int = 64, workers: int = 0
    ) -> dict[str, np.ndarray]:
        """Every metric's float32 score of each (image, prompt); NaN for an unreadable image."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Each metric's weights and settings."""
        ...


def is_judged(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the scores at `path` are complete and were made with these settings."""
    return path.exists() and not differences(read_settings(path), wanted)


def judge(
    samples: Sequence[Sample],
    scorers: Scorers,
    *,
    batch: int,
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Every judge's float32 scores, row for row; `advance` gets the number of images added.

    Images of a prompt are scored together, so that its text is embedded once.
    """
    order = sorted(range(len(samples)), key=lambda i: (samples[i].prompt.id, i))
    columns = {name: np.full(len(samples), np.nan, np.float32) for name in scorers.names}
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        images = [_content(samples[row].path) for row in rows]
        texts = [samples[row].prompt.text for row in rows]
        scores = scorers.score(images, texts, batch=batch, workers=workers)
        for name in scorers.names:
            columns[name][rows] = scores[name]
        for row, image in zip(rows, images, strict=True):
            if all(np.isnan(column[row]) for column in columns.values()):
                _pixels(samples[row].path, image)  # refused if it is damaged
        advance(len(rows))
    return columns


def _content(path: Path) -> bytes:
    """An image's bytes.

    Raises:
        SamplesError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SamplesError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error


def read_pixels(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """An image's pixels.

    Raises:
        SamplesError: The file cannot be read, or is no image any more.
    """
    return _pixels(path, _content(path))


def _pixels(path: Path, content: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image that was read.

    Raises:
        SamplesError: It is damaged; without it the comparison would have fewer images.
    """
    try:
        return to_pixels(decode(content))
    except UnreadableImageError as error:
        raise SamplesError(f"{path} is no image any more ({error}); {AGAIN}") from error


def read_scores(path: Path, names: Sequence[str]) -> dict[tuple[int, int], list[float]]:
    """Scores on disk: (prompt id, seed) -> each metric's, NaN where it is null."""
    table = read_table(path, schemas.sample_scores(names))
    columns = [table[f"score_{name}"].to_numpy().tolist() for name in names]
    keys = zip(table["prompt_id"].to_pylist(), table["seed"].to_pylist(), strict=True)
    return {key: list(row) for key, row in zip(keys, zip(*columns, strict=True), strict=True)}


def write_scores(
    path: Path,
    samples: Sequence[Sample],
    scores: Mapping[str, np.ndarray],
    *,
    folder: Path,
    prompts_name: str,
    settings: Mapping[str, Any],
) -> None:
    """Write scores of samples: null where not finite, with paths relative to `folder`."""
    columns = [
        pa.array([prompts_name] * len(samples), pa.string()),
        pa.array([image.prompt.id for image in samples], pa.int32()),
        pa.array([image.prompt.text for image in samples], pa.string()),
        pa.array([image.seed for image in samples], pa.int64()),
        pa.array([image.model for image in samples], pa.string()),
        pa.array([str(image.path.relative_to(folder)) for image in samples], pa.string()),
        *[
            pa.array(values, pa.float32(), mask=~np.isfinite(values), from_pandas=False)
            for values in scores.values()
        ],
    ]
    table = pa.Table.from_arrays(columns, schema=schemas.sample_scores(list(scores)))
    write_table(path, table, settings)
