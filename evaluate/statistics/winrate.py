"""Scores -> win rates with their uncertainty. Pure: knows no files and no models.

An image pair is what two models drew for one prompt from one noise. It is a win when the model's
score is above the base's by more than the judge's tie threshold; ties count half. Images of one
prompt are alike, so prompts and not images are what is resampled and what the sign test counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Float, Int

from data.artifacts import schemas
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
    """A metric and how it judges."""

    metric: str
    role: Role
    tie: float = 0.0
    """Score gaps up to this are ties; in the metric's units."""


class Verdict(StrEnum):
    """What a comparison has shown about one metric."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "not shown"


class Balance(StrEnum):
    """What a comparison has shown about all metrics together."""

    BALANCED = "balanced"
    """No metric is worse and at least one is better."""
    NOT_BALANCED = "not balanced"
    """Some metric is worse."""
    NOT_SHOWN = "not shown"
    """None is worse, none is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How a model fares against the base by one judge."""

    metric: str
    role: Role
    prompts: int
    """Prompts with at least one image pair that could be scored."""
    seeds: int
    wins: int
    ties: int
    losses: int
    unscored: int
    """Image pairs left out because one of the two has no score."""
    win_rate: Estimate
    """Mean over image pairs, ties half, in [0, 1]."""
    change: Estimate
    """Mean score of the model minus that of the base, in the metric's units."""
    mean_base: float
    mean_model: float
    std_base: float
    """Standard deviation of the base's scores over images: the scale of `change`."""
    p_value: float
    """Exact two-sided sign test over prompts, ties left out."""
    holm: float
    """The same, adjusted for the number of judges (Holm 1979)."""
    needed: int | None
    """Prompts of this kind that would find a difference as large as the one seen, four times in
    five; None where none was seen."""

    @property
    def verdict(self) -> Verdict:
        """Better or worse only when the interval and the sign test both say so."""
        if self.p_value > 1 - CONFIDENCE:
            return Verdict.NOT_SHOWN
        if self.win_rate.low > 0.5:
            return Verdict.BETTER
        return Verdict.WORSE if self.win_rate.high < 0.5 else Verdict.NOT_SHOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model against the base, by all judges."""

    base: str
    model: str
    rates: list[WinRate]
    average: Estimate
    """Mean of the voters' win rates."""
    joint_dominance: Estimate
    """Share of prompts on which every voter sees the model win."""
    joint_loss: Estimate
    """Share of prompts on which every voter sees it lose."""

    @property
    def balance(self) -> Balance:
        """Whether the model gained without losing anywhere; over every judge, voter or not."""
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
    """Compare two models whose images have been scored (`tables.sample_scores`).

    Raises:
        ValueError: A judge scored no image pair at all, or the voters share no prompt.
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
    draws = Bootstrap(
        {f"win {metric}": won[metric] for metric in metrics}
        | {f"change {metric}": changed[metric] for metric in metrics}
        | joint({metric: won[metric] for metric in voters}),
        resamples=resamples,
        seed=seed,
    )
    rates = [_rate(pairs, judge, outcomes[judge.metric], prompt, draws) for judge in judges]
    return Comparison(
        base=base,
        model=model,
        rates=with_holm(rates),
        average=draws.mean(*[f"win {metric}" for metric in voters], is_rate=True),
        joint_dominance=draws.mean("dominance", is_rate=True),
        joint_loss=draws.mean("loss", is_rate=True),
    )


def paired(scores: pl.DataFrame, metrics: Sequence[str], base: str, model: str) -> pl.DataFrame:
    """One row per image pair: `prompt` (0, 1, ...), `seed`, and `<metric>`, `<metric>_base`.

    An image that only one of the models has gives a row with nulls: nothing vanishes.
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
    """1 for a win, 0 for a loss, 0.5 for a tie, NaN without both scores."""
    change = gap(pairs, judge.metric)
    return (1 + np.where(np.abs(change) <= judge.tie, 0, np.sign(change))) / 2


def joint(voters: Mapping[str, PerPrompt]) -> dict[str, PerPrompt]:
    """`dominance` and `loss`: of each prompt that all voters scored, do all see a win, a loss.

    With several seeds a prompt is won when the mean outcome over its seeds is above a half.

    Raises:
        ValueError: No prompt was scored by all of them.
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
    """The same win rates, their p-values adjusted for each other."""
    adjusted = holm([rate.p_value for rate in rates])
    return [replace(rate, holm=value) for rate, value in zip(rates, adjusted, strict=True)]


def table(comparisons: Sequence[Comparison], prompts_name: str) -> pa.Table:
    """Win rates as `winrates.parquet` holds them (`tables.WIN_RATES`)."""
    rows = [
        {
            **{
                name: getattr(rate, name) for name in schemas.WIN_RATES.names if hasattr(rate, name)
            },
            "prompts_name": prompts_name,
            "base": comparison.base,
            "model": comparison.model,
            "win_rate": rate.win_rate.value,
            "ci_low": rate.win_rate.low,
            "ci_high": rate.win_rate.high,
        }
        for comparison in comparisons
        for rate in comparison.rates
    ]
    return pa.Table.from_pylist(rows, schema=schemas.WIN_RATES)


def _rate(
    pairs: pl.DataFrame,
    judge: Judge,
    outcomes: Float[np.ndarray, " pair"],
    prompt: Int[np.ndarray, " pair"],
    draws: Bootstrap,
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
        win_rate=draws.mean(f"win {judge.metric}", is_rate=True),
        change=draws.mean(f"change {judge.metric}", is_rate=False),
        mean_base=float(base.mean()),
        mean_model=float(pairs[judge.metric].to_numpy()[known].mean()),
        std_base=float(base.std()),
        p_value=p_value,
        holm=p_value,
        needed=_needed(means),
    )


def _needed(means: Float[np.ndarray, " prompt"]) -> int | None:
    """Prompts to draw, given how many of them end in a tie."""
    decided = means[means != 0.5]
    if not len(decided):
        return None
    needed = needed_prompts(float((decided > 0.5).mean()))
    return None if needed is None else math.ceil(needed * len(means) / len(decided))
