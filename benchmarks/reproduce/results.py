"""Scores of all models -> win rates of arms, pooled over training seeds. Pure.

An image pair is what two arms of the same training seed drew for one prompt from one noise. The
pairs of all training seeds count; prompts are resampled as wholes, so the interval is over prompts.
What a training seed changes is shown beside it: the lowest and the highest rate of a single seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from data.artifacts.schemas import Role
from evaluate.statistics.bootstrap import Estimate
from evaluate.statistics.winrate import (
    Comparison,
    Judge,
    Verdict,
    WinRate,
    compare,
    outcome,
    paired,
)

APART = 1_000_000
"""Between the image seeds of two training seeds, to keep them apart in one column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One arm against another (or the base)."""

    arm: str
    against: str
    comparison: Comparison
    by_seed: list[dict[str, float]]
    """Each training seed's win rates by judge, and `average` over the voters."""

    def rate(self, metric: str) -> WinRate:
        """What one judge says."""
        return next(rate for rate in self.comparison.rates if rate.metric == metric)

    @property
    def weakest(self) -> WinRate:
        """The voter that is won least: what balance is about."""
        voters = [rate for rate in self.comparison.rates if rate.role is Role.VOTER]
        return min(voters, key=lambda rate: rate.win_rate.value)

    @property
    def others(self) -> list[WinRate]:
        """What the judges say that have no vote."""
        return [rate for rate in self.comparison.rates if rate.role is not Role.VOTER]

    @property
    def average(self) -> Estimate:
        """Mean of the voters' win rates."""
        return self.comparison.average

    @property
    def gain(self) -> float:
        """Mean change of the voters' scores, each in standard deviations of the other's scores.

        How much is won, where a win rate says how often.
        """
        voters = [rate for rate in self.comparison.rates if rate.role is Role.VOTER]
        return float(np.mean([rate.change.value / (rate.std_base or 1.0) for rate in voters]))

    def spread(self, what: str = "average") -> tuple[float, float, float]:
        """Lowest, highest and standard deviation (n - 1) over training seeds; NaN for one seed."""
        rates = np.array([seed[what] for seed in self.by_seed])
        deviation = float(rates.std(ddof=1)) if len(rates) > 1 else float("nan")
        return float(rates.min()), float(rates.max()), deviation

    @property
    def verdicts(self) -> tuple[int, int]:
        """By how many judges, voters or not, it is shown to be better and to be worse."""
        found = [rate.verdict for rate in self.comparison.rates]
        return found.count(Verdict.BETTER), found.count(Verdict.WORSE)

    @property
    def held(self) -> str:
        """Whether `arm` is better on the voters' average: what the claims are about.

        It takes the interval over prompts and every single training seed.
        """
        low, high, _ = self.spread()
        if self.average.low > 0.5 and low > 0.5:
            return "holds"
        return "is contradicted" if self.average.high < 0.5 and high < 0.5 else "is not shown"


def contrast(
    scores: Mapping[str, pl.DataFrame],
    judges: Sequence[Judge],
    arm: str,
    against: str,
    *,
    resamples: int,
) -> Contrast:
    """Compare two arms by the training seeds that both have; an arm of one model has it for all.

    `scores` maps `<arm>-<seed>` (and the base's name) to that model's rows of `scores.parquet`.

    Raises:
        ValueError: They share no training seed.
    """
    seeds = sorted(_seeds(scores, arm) & _seeds(scores, against))
    if not seeds:
        raise ValueError(f"{arm} and {against} have no training seed in common")
    frames = [
        _of_seed(scores, name, seed).with_columns(
            model=pl.lit(name), seed=pl.col("seed") + APART * seed
        )
        for name in (arm, against)
        for seed in seeds
    ]
    pooled = pl.concat(frames)
    found = compare(pooled, judges, against, arm, resamples=resamples, seed=0)
    by_seed = [
        _rates(pooled.filter(pl.col("seed") // APART == seed), judges, arm, against)
        for seed in seeds
    ]
    return Contrast(arm=arm, against=against, comparison=found, by_seed=by_seed)


def _seeds(scores: Mapping[str, pl.DataFrame], arm: str) -> set[int]:
    if arm in scores:
        return {int(name.rpartition("-")[2]) for name in scores if "-" in name}
    return {int(name.rpartition("-")[2]) for name in scores if name.rpartition("-")[0] == arm}


def _of_seed(scores: Mapping[str, pl.DataFrame], arm: str, seed: int) -> pl.DataFrame:
    return scores[arm] if arm in scores else scores[f"{arm}-{seed}"]


def _rates(
    scores: pl.DataFrame, judges: Sequence[Judge], arm: str, against: str
) -> dict[str, float]:
    """One training seed's win rates."""
    pairs = paired(scores, [judge.metric for judge in judges], against, arm)
    rates = {judge.metric: float(np.nanmean(outcome(pairs, judge))) for judge in judges}
    voters = [judge.metric for judge in judges if judge.role is Role.VOTER]
    return rates | {"average": float(np.mean([rates[metric] for metric in voters]))}
