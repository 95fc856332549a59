"""Chooses the image pairs that the report shows, and embeds their images."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data.images import UnreadableImageError, decode, encode_jpeg, to_pixels

SIDE = 384
"""Larger images are scaled down to this side for the report; the originals stay in `samples/`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One judge's score of both images."""

    metric: str
    base: float
    model: float

    @property
    def gap(self) -> float:
        """The model's score minus the base's; above 0 the model's image is better."""
        return self.model - self.base


@dataclass(frozen=True, slots=True)
class Card:
    """Two images from the same noise."""

    prompt: str
    seed: int
    base: str
    """Data URI; empty if the image does not exist any more."""
    model: str
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Image pairs chosen by one rule."""

    title: str
    rule: str
    cards: list[Card]


def galleries(
    scores: pl.DataFrame, root: Path, comparison: dict[str, Any], number: int, seed: int
) -> list[Gallery]:
    """Random pairs first, then the voters' best wins, worst losses and disagreements."""
    rates = comparison["rates"]
    pairs = side_by_side(scores, comparison["base"], comparison["model"])
    metrics = [rate["metric"] for rate in rates]
    scaled = _scaled(pairs, [rate for rate in rates if rate["role"] == "voter"])
    if not len(pairs) or not number:
        return []
    mean = np.nan_to_num(scaled.mean(1))
    split = np.nan_to_num(np.minimum(scaled.max(1), -scaled.min(1)))
    random = np.random.default_rng(seed).permutation(len(pairs))[:number]
    falling, rising = np.argsort(-mean, kind="stable"), np.argsort(mean, kind="stable")
    apart = np.argsort(-split, kind="stable")
    chosen: list[tuple[str, str, Sequence[int] | np.ndarray]] = [
        ("Not chosen", "pairs drawn at random", random),
        ("Best wins", "the voters' mean gain is largest", [i for i in falling if mean[i] > 0]),
        ("Worst losses", "the voters' mean loss is largest", [i for i in rising if mean[i] < 0]),
        (
            "Metrics disagree",
            "one voter gains as another loses",
            [i for i in apart if split[i] > 0],
        ),
    ]
    rows = pairs.to_dicts()
    return [
        Gallery(title, rule, [_card(rows[int(i)], metrics, root) for i in list(order)[:number]])
        for title, rule, order in chosen
        if len(order)
    ]


def side_by_side(scores: pl.DataFrame, base: str, model: str) -> pl.DataFrame:
    """One row per image pair; the base's columns end in `_base`."""
    other = scores.filter(pl.col("model") == base)
    one = scores.filter(pl.col("model") == model)
    keys = ["prompt_id", "seed"]
    return one.join(other, on=keys, suffix="_base", validate="1:1").sort(keys)


def _scaled(pairs: pl.DataFrame, voters: list[dict[str, Any]]) -> np.ndarray:
    """Score gaps (pair, voter) in standard deviations of the base's scores; NaN if unscored."""
    gaps = [
        (pairs[f"score_{rate['metric']}"] - pairs[f"score_{rate['metric']}_base"])
        .cast(pl.Float64)
        .fill_null(float("nan"))
        .to_numpy()
        / (rate["std_base"] or 1.0)
        for rate in voters
    ]
    return np.stack(gaps, axis=1)


def _card(row: dict[str, Any], metrics: list[str], root: Path) -> Card:
    changes = [
        Change(metric, row[f"score_{metric}_base"], row[f"score_{metric}"])
        for metric in metrics
        if row[f"score_{metric}"] is not None and row[f"score_{metric}_base"] is not None
    ]
    base, model = inline(root / row["path_base"]), inline(root / row["path"])
    return Card(row["prompt"], row["seed"], base, model, changes)


def inline(path: Path) -> str:
    """An image as a data URI, scaled down to a JPEG if it is large; empty if it cannot be read."""
    try:
        content, kind = path.read_bytes(), "png"
        image = decode(content)
    except (OSError, UnreadableImageError):
        return ""
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
        content, kind = encode_jpeg(to_pixels(image), quality=85), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
