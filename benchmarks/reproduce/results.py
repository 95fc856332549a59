"""Scores of all models -> win rates of arms, pooled over training seeds. Pure.

An image pair is the images of two arms with the same training seed, for one prompt from one
initial noise. The pairs of all training seeds are pooled and whole prompts are resampled, so the
interval is over prompts. The lowest and highest rates of single training seeds are given beside it.
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
"""Offset of the image seeds per training seed, to keep them apart in one column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One arm against another (or the base)."""

    arm: str
    against: str
    comparison: Comparison
    by_seed: list[dict[str, float]]
    """Each training seed's win rates by judge, and their `average` over the voters."""

    def rate(self, metric: str) -> WinRate:
        """The win rate according to one judge."""
        return next(rate for rate in self.comparison.rates if rate.metric == metric)

    @property
    def weakest(self) -> WinRate:
        """The lowest win rate of a voter: what balance is about."""
        voters = [rate for rate in self.comparison.rates if rate.role is Role.VOTER]
        return min(voters, key=lambda rate: rate.win_rate.value)

    @property
    def others(self) -> list[WinRate]:
        """The win rates according to the judges without a vote."""
        return [rate for rate in self.comparison.rates if rate.role is not Role.VOTER]

    @property
    def average(self) -> Estimate:
        """Mean of the voters' win rates."""
        return self.comparison.average

    @property
    def gain(self) -> float:
        """Mean change of the voters' scores, each in standard deviations of the other's scores.

        It says how much is won; a win rate says how often.
        """
        voters = [rate for rate in self.comparison.rates if rate.role is Role.VOTER]
        return float(np.mean([rate.change.value / (rate.std_base or 1.0) for rate in voters]))

    def spread(self, judge: str = "average") -> tuple[float, float, float]:
        """Lowest, highest and standard deviation (n - 1) over training seeds; NaN for one seed."""
        rates = np.array([seed[judge] for seed in self.by_seed])
        deviation = float(rates.std(ddof=1)) if len(rates) > 1 else float("nan")
        return float(rates.min()), float(rates.max()), deviation

    @property
    def verdicts(self) -> tuple[int, int]:
        """The number of judges that show `arm` to be better, and to be worse."""
        verdicts = [rate.verdict for rate in self.comparison.rates]
        return verdicts.count(Verdict.BETTER), verdicts.count(Verdict.WORSE)

    @property
    def conclusion(self) -> str:
        """Whether the claim that `arm` is better on the voters' average holds.

        The interval over prompts and every single training seed must agree.
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
    """Compare two arms on the training seeds that both have; the base counts for every seed.

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
    comparison = compare(pooled, judges, against, arm, resamples=resamples, seed=0)
    by_seed = [
        _rates(pooled.filter(pl.col("seed") // APART == seed), judges, arm, against)
        for seed in seeds
    ]
    return Contrast(arm=arm, against=against, comparison=comparison, by_seed=by_seed)


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
