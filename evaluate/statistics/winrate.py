"""Scores -> win rates with their uncertainty. Pure: no files, no models.

An image pair is two models' images for one prompt from one initial noise. It is a win when the
model's score exceeds the base's by more than the judge's tie threshold; ties count half. Images of
one prompt are alike, so the bootstrap and the sign test are over prompts, not images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from data.artifacts.schemas import Role
from evaluate.statistics.bootstrap import (
    CONFIDENCE,
    Bootstrap,
    Estimate,
    PerPrompt,
    holm,
    per_prompt,
    sign_test,
)
from evaluate.statistics.power import needed_prompts


@dataclass(frozen=True, slots=True)
class Judge:
    """A metric, its role, and its tie threshold."""

    metric: str
    role: Role
    tie: float = 0.0
    """Score gaps up to this, in the metric's units, are ties."""


class Verdict(StrEnum):
    """What the comparison shows for one metric."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "not shown"


class Balance(StrEnum):
    """What the comparison shows for all metrics together."""

    BALANCED = "balanced"
    """No metric is worse and at least one is better."""
    NOT_BALANCED = "not balanced"
    """At least one metric is worse."""
    NOT_SHOWN = "not shown"
    """No metric is worse and none is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """The result of a model against the base, according to one judge."""

    metric: str
    role: Role
    prompts: int
    """Prompts with at least one scored image pair."""
    seeds: int
    wins: int
    ties: int
    losses: int
    unscored: int
    """Image pairs left out because an image has no score."""
    win_rate: Estimate
    """Mean over image pairs, in [0, 1]; ties count half."""
    change: Estimate
    """Mean score of the model minus that of the base, in the metric's units."""
    mean_base: float
    mean_model: float
    std_base: float
    """Standard deviation of the base's scores over images: the scale of `change`."""
    p_value: float
    """Exact two-sided sign test over prompts, without ties."""
    holm: float
    """The p-value adjusted for the number of judges (Holm 1979)."""
    needed: int | None
    """Prompts needed to detect a difference of the observed size with 80 % power; None if no
    difference was observed."""

    @property
    def verdict(self) -> Verdict:
        """Better or worse only if the interval and the sign test agree."""
        if self.p_value > 1 - CONFIDENCE:
            return Verdict.NOT_SHOWN
        if self.win_rate.low > 0.5:
            return Verdict.BETTER
        return Verdict.WORSE if self.win_rate.high < 0.5 else Verdict.NOT_SHOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model against the base, according to all judges."""

    base: str
    model: str
    rates: list[WinRate]
    average: Estimate
    """Mean of the voters' win rates."""
    joint_dominance: Estimate
    """Fraction of prompts on which the model wins according to every voter."""
    joint_loss: Estimate
    """Fraction of prompts on which the model loses according to every voter."""

    @property
    def balance(self) -> Balance:
        """Whether the model gained without losing anywhere, according to all judges."""
        verdicts = {rate.verdict for rate in self.rates}
        if Verdict.WORSE in verdicts:
            return Balance.NOT_BALANCED
        return Balance.BALANCED if Verdict.BETTER in verdicts else Balance.NOT_SHOWN


def compare(
    scores: pl.DataFrame,
    judges: Sequence[Judge],
    base: str,
    model: str,
    *,
    resamples: int,
    seed: int,
) -> Comparison:
    """Compare two models by the scores of their images (`schemas.sample_scores`).

    Raises:
        ValueError: A judge scored no image pair, or no prompt was scored by all voters.
    """
    metrics = [judge.metric for judge in judges]
    voters = [judge.metric for judge in judges if judge.role is Role.VOTER]
    pairs = paired(scores, metrics, base, model)
    prompt = pairs["prompt"].to_numpy()
    outcomes = {judge.metric: outcome(pairs, judge) for judge in judges}
    won = {metric: per_prompt(outcomes[metric], prompt) for metric in metrics}
    changed = {metric: per_prompt(gap(pairs, metric), prompt) for metric in metrics}
    for metric in metrics:
        if not won[metric].number.any():
            raise ValueError(f"metric {metric!r} scored no image of both models")
    bootstrap = Bootstrap(
        {f"win {metric}": won[metric] for metric in metrics}
        | {f"change {metric}": changed[metric] for metric in metrics}
        | joint({metric: won[metric] for metric in voters}),
        resamples=resamples,
        seed=seed,
    )
    rates = [_rate(pairs, judge, outcomes[judge.metric], prompt, bootstrap) for judge in judges]
    return Comparison(
        base=base,
        model=model,
        rates=with_holm(rates),
        average=bootstrap.mean(*[f"win {metric}" for metric in voters], is_rate=True),
        joint_dominance=bootstrap.mean("dominance", is_rate=True),
        joint_loss=bootstrap.mean("loss", is_rate=True),
    )


def paired(scores: pl.DataFrame, metrics: Sequence[str], base: str, model: str) -> pl.DataFrame:
    """One row per image pair: `prompt` (0, 1, ...), `seed`, and `<metric>`, `<metric>_base`.

    An image that only one model has gives a row with nulls, so that it is counted.
    """
    columns = [pl.col(f"score_{metric}").cast(pl.Float64).alias(metric) for metric in metrics]
    one, other = (
        scores.filter(pl.col("model") == name).select("prompt_id", "seed", *columns)
        for name in (model, base)
    )
    both = one.join(
        other, on=["prompt_id", "seed"], how="full", suffix="_base", coalesce=True, validate="1:1"
    )
    rank = pl.col("prompt_id").rank("dense").cast(pl.Int64) - 1
    return both.sort("prompt_id", "seed").with_columns(prompt=rank)


def gap(pairs: pl.DataFrame, metric: str) -> Float[np.ndarray, " pair"]:
    """The model's score minus the base's; NaN without both."""
    both = pairs.select(metric, f"{metric}_base").fill_null(float("nan")).to_numpy()
    difference = both[:, 0] - both[:, 1]
    return np.where(np.isfinite(difference), difference, np.nan)


def outcome(pairs: pl.DataFrame, judge: Judge) -> Float[np.ndarray, " pair"]:
    """1 for a win, 0 for a loss, 0.5 for a tie; NaN without both scores."""
    change = gap(pairs, judge.metric)
    return (1 + np.where(np.abs(change) <= judge.tie, 0, np.sign(change))) / 2


def joint(voters: Mapping[str, PerPrompt]) -> dict[str, PerPrompt]:
    """`dominance` and `loss`: 1 for a prompt that is a win (a loss) according to every voter.

    Only prompts scored by all voters count. With several seeds a prompt is won when the mean
    outcome over its seeds is above a half.

    Raises:
        ValueError: No prompt was scored by all voters.
    """
    means = np.stack([voter.means for voter in voters.values()])
    known = (~np.isnan(means).any(0)).astype(float)
    if not known.any():
        raise ValueError(f"no prompt was scored by all voters ({', '.join(voters)})")
    return {
        "dominance": PerPrompt((means > 0.5).all(0).astype(float), known),  # NaN compares as False
        "loss": PerPrompt((means < 0.5).all(0).astype(float), known),
    }


def with_holm(rates: Sequence[WinRate]) -> list[WinRate]:
    """The same win rates, with `holm` computed from all their p-values."""
    adjusted = holm([rate.p_value for rate in rates])
    return [replace(rate, holm=value) for rate, value in zip(rates, adjusted, strict=True)]


def _rate(
    pairs: pl.DataFrame,
    judge: Judge,
    outcomes: Float[np.ndarray, " pair"],
    prompt: Int[np.ndarray, " pair"],
    bootstrap: Bootstrap,
) -> WinRate:
    known = ~np.isnan(outcomes)
    means = per_prompt(outcomes, prompt).means
    base = pairs[f"{judge.metric}_base"].to_numpy()[known]
    means = means[~np.isnan(means)]
    p_value = sign_test(means)
    return WinRate(
        metric=judge.metric,
        role=judge.role,
        prompts=len(means),
        seeds=pairs["seed"].n_unique(),
        wins=int((outcomes == 1).sum()),
        ties=int((outcomes == 0.5).sum()),
        losses=int((outcomes == 0).sum()),
        unscored=int((~known).sum()),
        win_rate=bootstrap.mean(f"win {judge.metric}", is_rate=True),
        change=bootstrap.mean(f"change {judge.metric}", is_rate=False),
        mean_base=float(base.mean()),
        mean_model=float(pairs[judge.metric].to_numpy()[known].mean()),
        std_base=float(base.std()),
        p_value=p_value,
        holm=p_value,
        needed=_needed(means),
    )


def _needed(means: Float[np.ndarray, " prompt"]) -> int | None:
    """Prompts needed, given that some of them will end in a tie."""
    decided = means[means != 0.5]
    if not len(decided):
        return None
    needed = needed_prompts(float((decided > 0.5).mean()))
    return None if needed is None else math.ceil(needed * len(means) / len(decided))
