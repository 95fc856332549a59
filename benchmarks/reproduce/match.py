"""Arms against each other over several training seeds, as they are or at an equal distance. Pure.

At an equal distance a side is a mixture of two models, one a little nearer to the base and one a
little further: an outcome is the mean of the outcomes of their images, by weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from benchmarks.reproduce.crossed import Outcomes, interval
from data.artifacts.schemas import Role
from evaluate.statistics.bootstrap import Estimate
from evaluate.statistics.winrate import Judge, gap, outcome, paired

AVERAGE = "average"
"""The mean over the voters, among the judges."""
Side = Sequence[tuple[float, pl.DataFrame]]
"""Weights and scores (a row per prompt, as `scores.parquet` has of one model and image seed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One arm against another, or against the base."""

    arm: str
    against: str
    seeds: tuple[int, ...]
    rates: Mapping[str, Estimate]
    """Judge -> win rate over prompts and seeds; `AVERAGE` of the voters."""
    by_seed: tuple[float, ...]
    """The voters' average of each training seed."""
    roles: Mapping[str, Role]
    gain: float
    """Mean change of the voters' scores, in standard deviations of the other side's."""

    @property
    def average(self) -> Estimate:
        """The mean of the voters' win rates."""
        return self.rates[AVERAGE]

    @property
    def weakest(self) -> str:
        """The voter with the lowest win rate."""
        voters = [name for name, role in self.roles.items() if role is Role.VOTER]
        return min(voters, key=lambda name: self.rates[name].value)

    @property
    def verdicts(self) -> tuple[int, int]:
        """The number of judges whose interval lies above one half, and below it."""
        rates = [self.rates[name] for name in self.roles]
        return sum(rate.low > 0.5 for rate in rates), sum(rate.high < 0.5 for rate in rates)

    @property
    def conclusion(self) -> str:
        """Whether the claim that `arm` is better holds: the whole interval lies above one half."""
        if self.average.low > 0.5:
            return "holds"
        return "is contradicted" if self.average.high < 0.5 else "is not shown"


def match(
    arm: str,
    against: str,
    sides: Mapping[int, Side],
    others: Mapping[int, Side],
    judges: Sequence[Judge],
) -> Match:
    """Compare two arms with the training seeds that both have.

    Raises:
        ValueError: They have none in common.
    """
    seeds = tuple(sorted(sides.keys() & others.keys()))
    if not seeds:
        raise ValueError(f"{arm} and {against} have no training seed in common")
    games = [_game(sides[seed], others[seed], judges) for seed in seeds]
    names = [*(judge.metric for judge in judges), AVERAGE]
    matrices: dict[str, Outcomes] = {
        name: np.stack([game[name] for game, _ in games], axis=1) for name in names
    }
    return Match(
        arm=arm,
        against=against,
        seeds=seeds,
        rates={name: interval(matrix) for name, matrix in matrices.items()},
        by_seed=tuple(float(np.nanmean(column)) for column in matrices[AVERAGE].T),
        roles={judge.metric: judge.role for judge in judges},
        gain=float(np.mean([gain for _, gain in games])),
    )


def _game(
    side: Side, other: Side, judges: Sequence[Judge]
) -> tuple[dict[str, Float[np.ndarray, " prompt"]], float]:
    """Of one seed, each judge's outcome by prompt, and the gain."""
    voters = [judge for judge in judges if judge.role is Role.VOTER]
    totals: dict[str, np.ndarray] = {}
    gain = 0.0
    for weight, ours in side:
        for their_weight, theirs in other:
            pairs = paired(
                pl.concat([ours.with_columns(model=pl.lit("model")),
                           theirs.with_columns(model=pl.lit("other"))]),
                [judge.metric for judge in judges], "other", "model",
            )  # fmt: skip
            outcomes = {judge.metric: outcome(pairs, judge) for judge in judges}
            outcomes[AVERAGE] = np.mean([outcomes[voter.metric] for voter in voters], axis=0)
            part = weight * their_weight
            for name, values in outcomes.items():
                totals[name] = totals.get(name, 0.0) + part * values
            gain += part * float(np.mean([_gain(pairs, voter.metric) for voter in voters]))
    return totals, gain


def _gain(pairs: pl.DataFrame, metric: str) -> float:
    """Mean change of a score, in standard deviations of the other side's."""
    change = np.nanmean(gap(pairs, metric))
    return float(change / (pairs[f"{metric}_base"].drop_nulls().std(ddof=0) or 1.0))
