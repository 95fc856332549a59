"""Writes the miniature's pair files: Parquet in the schema of Pick-a-Pic v2, defects included.

A user asks for a prompt, sees two images, and chooses; the loser is replaced by a new image
and the user chooses again. So an image stands in about 1.8 pairs, as in the real set.
"""

import datetime
import io
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.artifacts.schemas import PICKAPIC
from data.miniature import scenes
from data.miniature.scenes import Pixels, Split
from data.miniature.taste import HUMAN

LONGEST_SESSION = 17
"""Most choices of one user on one prompt; nine on average, so an image stands in 1.8 pairs."""
TIE_WITHIN = 0.25
"""A human calls it a tie when the felt difference is smaller; about 11 % of pairs."""
NO_LABEL_RATE = 0.01
"""Fraction of pairs without a choice."""
ROW_GROUP = 256
MODELS = ("weak", "plain", "dreamlike")
"""Generators by rising quality; an image is named after the third that its quality lies in."""
DEFECTS = ("torn jpeg", "no bytes", "html", "empty prompt", "png")
"""What is wrong with some rows; the PNG in a column called jpg is readable."""
PAIRS_PER_DEFECT = 1000
"""Every defect occurs once in so many pairs, and at least once."""
FEWEST_FOR_DEFECTS = 20
"""Smaller sets have no defects."""


@dataclass(frozen=True, slots=True)
class _Image:
    uid: str
    content: bytes
    pleasure: float
    model: str


def write_pairs(
    folder: Path, num_pairs: int, seed: int, shards: int, split: Split = "train"
) -> None:
    """Write `split`-00000-of-0000N.parquet and so on; the same arguments give the same bytes.

    Args:
        folder: Made if needed.
        num_pairs: Rows over all files.
        seed: Of everything.
        shards: Number of files; each gets equally many rows.
        split: Prompts of this split alone are used.
    """
    if not 1 <= shards <= num_pairs:
        raise ValueError(f"shards={shards} must lie between 1 and num_pairs={num_pairs}")
    rng = np.random.default_rng([seed, num_pairs])
    rows = _rows(num_pairs, split, rng)
    _spoil(rows, rng)
    folder.mkdir(parents=True, exist_ok=True)
    cuts = np.linspace(0, num_pairs, shards + 1).round().astype(int)
    for i in range(shards):
        table = pa.Table.from_pylist(rows[cuts[i] : cuts[i + 1]], schema=PICKAPIC)
        path = folder / f"{split}-{i:05d}-of-{shards:05d}.parquet"
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, partial, row_group_size=ROW_GROUP)
        partial.replace(path)


def _rows(num_pairs: int, split: Split, rng: np.random.Generator) -> list[dict[str, Any]]:
    """All rows, session after session, until there are enough."""
    texts = scenes.prompts(split)
    rows: list[dict[str, Any]] = []
    ranking = 0
    while len(rows) < num_pairs:
        prompt = texts[int(rng.integers(len(texts)))]
        length = min(int(rng.integers(1, LONGEST_SESSION + 1)), num_pairs - len(rows))
        user = int(rng.integers(1, 400))
        rows += _session(prompt, length, {"ranking_id": ranking, "user_id": user}, rng)
        ranking += 1
    for i, row in enumerate(rows):
        row["__index_level_0__"] = i
        row["created_at"] = datetime.datetime(2023, 3, 22, 14, 11, 18) + datetime.timedelta(
            seconds=17 * i
        )
    return rows


def _session(
    prompt: str, length: int, common: dict[str, Any], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """One user's choices on one prompt: the preferred image stays where it is."""
    sides = [_new_image(prompt, rng), _new_image(prompt, rng)]
    for _ in range(length):
        felt = sides[0].pleasure - sides[1].pleasure + rng.logistic(0, HUMAN.doubt)
        tie = abs(felt) < TIE_WITHIN
        best = 0 if felt > 0 else 1
        label = 0.5 if tie else float(best == 0)
        has_label = bool(rng.random() >= NO_LABEL_RATE)
        yield (
            common
            | _columns(sides, prompt)
            | {
                "best_image_uid": "tie" if tie else sides[best].uid,
                "has_label": has_label,
                "label_0": label,
                "label_1": 1 - label,
                "num_example_per_prompt": length,
            }
        )
        sides[1 - best] = _new_image(prompt, rng)


def _columns(sides: list[_Image], prompt: str) -> dict[str, Any]:
    row: dict[str, Any] = {"caption": prompt, "are_different": sides[0].content != sides[1].content}
    for i, image in enumerate(sides):
        row[f"image_{i}_uid"] = image.uid
        row[f"image_{i}_url"] = f"https://example.invalid/images/{image.uid}.png"
        row[f"jpg_{i}"] = image.content
        row[f"model_{i}"] = image.model
    return row


def _new_image(prompt: str, rng: np.random.Generator) -> _Image:
    image = scenes.imagine(prompt, rng)
    return _Image(
        uid=str(uuid.UUID(bytes=rng.bytes(16), version=4)),
        content=_encode(image.pixels, "JPEG"),
        pleasure=HUMAN.pleasure(image, prompt),
        model=f"miniature/{MODELS[int(image.quality * len(MODELS))]}",
    )


def _encode(pixels: Pixels, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, quality=90, subsampling=0)
    return buffer.getvalue()


def _spoil(rows: list[dict[str, Any]], rng: np.random.Generator) -> None:
    """Damage a few rows, each in one way, and leave all others alone."""
    if len(rows) < FEWEST_FOR_DEFECTS:
        return
    defects = DEFECTS * max(1, len(rows) // PAIRS_PER_DEFECT)
    for place, defect in zip(rng.permutation(len(rows)), defects, strict=False):
        row, column = rows[place], f"jpg_{int(rng.integers(2))}"
        if defect == "torn jpeg":
            row[column] = row[column][: len(row[column]) // 2]
        elif defect == "no bytes":
            row[column] = b""
        elif defect == "html":
            row[column] = b"<html><body>AccessDenied</body></html>"
        elif defect == "empty prompt":
            row["caption"] = ""
        else:
            row[column] = _encode(np.asarray(Image.open(io.BytesIO(row[column]))), "PNG")
