"""How often a metric prefers the image that people prefer, as each benchmark counts it.

The benchmarks differ in what they make of ties, so that their figures cannot be compared. All take
`gap`, the score of image 0 minus that of image 1, and `human`: 1 where people took image 0, 0 where
they took image 1, 0.5 where they took none.
"""

import math
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import polars as pl
from jaxtyping import Float

THRESHOLDS = tuple(step / 10 for step in range(11))
"""Differences of chances up to which Pick-a-Pic's evaluation tries to call a pair a tie."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A metric on a set of pairs; each rate is in [0, 1], NaN where no pair counts."""

    metric: str
    pairs: int
    """Pairs with both scores and a human label, ties among them."""
    ties: int
    """Pairs that people called a tie."""
    strict: float
    inversions: float
    thresholded: float


def measure(metric: str, judged: pl.DataFrame, scale: float, threshold: float | None) -> Accuracy:
    """All three figures of pairs with `pair_id`, `prompt`, `human`, `score_0` and `score_1`.

    `scale` turns scores into the logits of a choice. Without a `threshold` for Pick-a-Pic's ties it
    is chosen on one half of the pairs and used on the other.
    """
    rows = judged.drop_nulls(["human", "score_0", "score_1"])
    human = rows["human"].to_numpy().astype(np.float64)
    gap = (rows["score_0"].cast(pl.Float64) - rows["score_1"].cast(pl.Float64)).to_numpy()
    chance = np.tanh(scale * gap / 2)  # difference of both chances, their softmax
    if threshold is None:
        half = np.array([crc32(name.encode()) % 2 for name in rows["pair_id"]], dtype=int)
        thresholded = cross_fitted(human, chance, half)
    else:
        thresholded = with_ties(human, chance, threshold)
    return Accuracy(
        metric,
        pairs=len(rows),
        ties=int((human == 0.5).sum()),
        strict=strict(human, gap),
        inversions=without_inversions(human, gap, rows["prompt"]),
        thresholded=thresholded,
    )


def strict(human: Float[np.ndarray, " pair"], gap: Float[np.ndarray, " pair"]) -> float:
    """ImageReward's: pairs that people tied do not count, equal scores are wrong."""
    decided = human != 0.5
    return _mean(gap[decided] * (human[decided] - 0.5) > 0)


def without_inversions(
    human: Float[np.ndarray, " pair"], gap: Float[np.ndarray, " pair"], prompts: pl.Series
) -> float:
    """HPDv2's: the share of a prompt's pairs that are not the wrong way round, over prompts.

    Equal scores are right; pairs that people tied do not count (HPDv2's rankings have none).
    """
    decided = human != 0.5
    right = gap[decided] * (human[decided] - 0.5) >= 0
    frame = pl.DataFrame({"prompt": prompts.filter(pl.Series(decided)), "right": right})
    each = frame.group_by("prompt").agg(pl.col("right").mean())
    return _mean(each["right"].to_numpy())


def with_ties(
    human: Float[np.ndarray, " pair"], chance: Float[np.ndarray, " pair"], threshold: float
) -> float:
    """Pick-a-Pic's: chances not further apart than `threshold` are a tie.

    A pair counts 1 where both sides say the same, 0.5 where just one says tie, else 0.
    """
    tied = np.abs(chance) <= threshold
    people_tied = human == 0.5
    same = np.where(tied, people_tied, ~people_tied & (chance * (human - 0.5) > 0))
    return _mean(np.where(same, 1.0, np.where(tied | people_tied, 0.5, 0.0)))


def cross_fitted(
    human: Float[np.ndarray, " pair"], chance: Float[np.ndarray, " pair"], half: Any
) -> float:
    """`with_ties` where each half's threshold is the best one of the other half."""
    total = 0.0
    for side in (0, 1):
        own, other = half == side, half != side
        if own.any() and not other.any():
            return math.nan
        best = max(THRESHOLDS, key=lambda t: with_ties(human[other], chance[other], t))
        total += with_ties(human[own], chance[own], best) * own.sum() if own.any() else 0.0
    return total / len(human) if len(human) else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
