"""Everything that `make inspect` says of a label set, computed once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from label.analysis import agreement, breakdowns, crowd
from label.voting.label_set import outcomes, statuses
from label.voting.rules import VotingRule

MOST_GROUPS = 10
"""Groups that are listed of what may have thousands: reasons, sizes, generators, divisions."""
BINS = 61
"""Of a histogram of score gaps; odd, so that 0 lies in the middle of one."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """How far apart a metric's two scores are: image 0's minus image 1's."""

    metric: str
    limit: float
    """The histogram runs from -limit to limit, in the metric's units; 99 % of gaps are inside."""
    counts: list[int]
    tie: float
    """Gaps up to this abstain."""


@dataclass(frozen=True, slots=True)
class Study:
    """Statistics of a label set."""

    voting_rule: VotingRule
    statuses: Mapping[str, int]
    """Status -> rows, `ok` first."""
    outcomes: Mapping[str, int]
    """`decided_by` -> rows."""
    overall: Mapping[str, Any]
    names: list[str]
    """The metrics, and `human` where people chose."""
    shares: np.ndarray
    kappas: np.ndarray
    """(name, name) Shares of equal votes, and Cohen's kappas."""
    metrics: pl.DataFrame
    pairwise: pl.DataFrame
    margins: pl.DataFrame
    ties: pl.DataFrame
    coalitions: pl.DataFrame
    without: pl.DataFrame
    """What the majority would be without each voter."""
    reasons: pl.DataFrame
    sizes: pl.DataFrame
    shapes: pl.DataFrame
    larger: Mapping[str, float | None]
    generators: pl.DataFrame | None
    """None where the pair set does not say who made its images."""
    gaps: list[Gaps]
    crowd: crowd.Comparison | None


def study(
    labelled: pl.DataFrame, voting_rule: VotingRule, generators: pl.DataFrame | None = None
) -> Study:
    """All statistics; `generators` has `generator_0` and `generator_1`, row for row."""
    counted = agreement.ballots(labelled)
    names, shares, kappas = agreement.matrices(counted)
    made_by = None if generators is None else breakdowns.by_generator(labelled, generators)
    return Study(
        voting_rule=voting_rule,
        statuses=statuses(labelled),
        outcomes=outcomes(labelled),
        overall=breakdowns.overall(counted),
        names=names,
        shares=shares,
        kappas=kappas,
        metrics=agreement.per_metric(counted),
        pairwise=agreement.pairwise(counted, agreement.rank_correlations(labelled)),
        margins=breakdowns.margins(counted),
        ties=breakdowns.ties(counted, voting_rule.spec.rule.value),
        coalitions=breakdowns.coalitions(counted, voting_rule, MOST_GROUPS),
        without=breakdowns.leave_one_out(counted, voting_rule),
        reasons=breakdowns.reasons(labelled, MOST_GROUPS),
        sizes=breakdowns.by_size(labelled, MOST_GROUPS),
        shapes=breakdowns.by_shape(labelled),
        larger=breakdowns.larger_wins(labelled),
        generators=None if made_by is None or made_by.is_empty() else made_by.head(MOST_GROUPS),
        gaps=[gaps(labelled, metric, voting_rule) for metric in agreement.metrics_of(labelled)],
        crowd=crowd.compare(counted, voting_rule.voters),
    )


def gaps(labelled: pl.DataFrame, metric: str, voting_rule: VotingRule) -> Gaps:
    """The histogram of a metric's score gaps."""
    gap = (labelled[f"score_{metric}_0"] - labelled[f"score_{metric}_1"]).drop_nulls().to_numpy()
    limit = float(np.quantile(np.abs(gap), 0.99)) if len(gap) else 0.0
    limit = limit or 1.0  # all gaps are 0
    counts, _ = np.histogram(gap, BINS, (-limit, limit))
    return Gaps(metric, limit, counts.tolist(), voting_rule.ties.get(metric, 0.0))
