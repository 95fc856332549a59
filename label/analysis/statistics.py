"""Everything that `make inspect` says about a label set, computed once."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
import polars as pl

from label.analysis import agreement, breakdowns
from label.analysis.tables import Table, matrix
from label.voting.label_set import outcomes, statuses
from label.voting.rules import VotingRule

MAX_GROUPS = 10
"""Rows of tables that might have thousands: reasons, sizes, generators, divisions."""
BINS = 61
"""Bins of a histogram of score gaps; odd, so that 0 lies in the middle of one."""


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
class Statistics:
    """Statistics of a label set."""

    voting_rule: VotingRule
    statuses: Mapping[str, int]
    """Status -> rows, `ok` first."""
    outcomes: Mapping[str, int]
    """`decided_by` -> rows."""
    decided: int
    """Pairs with a winner."""
    human_agreement: float | None
    """Fraction of labels that are the human choice, where the one did not decide the other."""
    alpha: float | None
    """Krippendorff's alpha of the metrics."""
    tables: Mapping[str, Table]
    """Name -> table, in the order to read them in."""
    gaps: list[Gaps]

    @property
    def num_pairs(self) -> int:
        """All rows, scored or not."""
        return sum(self.outcomes.values())

    @property
    def chance_deviation(self) -> float:
        """How far from 0.5 the fraction of votes for image 0 is by chance, in 95 % of such sets."""
        return 0.98 / sqrt(self.statuses.get("ok", 0) or 1)


def compute_statistics(
    labelled: pl.DataFrame, voting_rule: VotingRule, generators: pl.DataFrame | None = None
) -> Statistics:
    """All statistics; `generators` has `generator_0` and `generator_1`, row for row."""
    counted = agreement.ballots(labelled)
    return Statistics(
        voting_rule=voting_rule,
        statuses=statuses(labelled),
        outcomes=outcomes(labelled),
        decided=agreement.num_pairs(counted, agreement.DECIDED),
        human_agreement=agreement.rate(counted, agreement.LABEL_AGREES, agreement.JUDGED),
        alpha=agreement.krippendorff_alpha(counted),
        tables=make_tables(labelled, counted, voting_rule, generators),
        gaps=[gaps(labelled, metric, voting_rule) for metric in agreement.metrics_of(labelled)],
    )


def make_tables(
    labelled: pl.DataFrame,
    counted: pl.DataFrame,
    voting_rule: VotingRule,
    generators: pl.DataFrame | None,
) -> dict[str, Table]:
    """The tables of the terminal and the page."""
    ties = breakdowns.ties(counted, voting_rule.spec.rule.value)
    coalitions = breakdowns.coalitions(counted, voting_rule, MAX_GROUPS)
    tables = {
        "reasons": Table("Why rows could not be scored; N stands for any number",
                         breakdowns.reasons(labelled, MAX_GROUPS)),
        "ties": Table("What the rule left open", ties),
        "coalitions": Table("Who votes with whom, whichever image they choose", coalitions),
        "voters": Table("Each voter, and the label", agreement.voters(counted)),
        "agreement": agreement_table(counted),
        "margins": Table("By lead in votes", breakdowns.margins(counted)),
        "without": Table("The majority without one of the voters",
                         breakdowns.leave_one_out(counted, voting_rule)),
        "sizes": Table("By size", breakdowns.by_size(labelled, MAX_GROUPS)),
    }  # fmt: skip
    if generators is not None:
        frame = breakdowns.by_generator(labelled, generators, MAX_GROUPS)
        tables["generators"] = Table("By generators", frame)
    return {name: table for name, table in tables.items() if len(table.frame)}


def agreement_table(counted: pl.DataFrame) -> Table:
    """The matrix of equal votes, also printed by itself after `make labels`."""
    frame = agreement.agreement_matrix(counted)
    return matrix("Equal votes, where neither abstains", frame)


def gaps(labelled: pl.DataFrame, metric: str, voting_rule: VotingRule) -> Gaps:
    """The histogram of a metric's score gaps."""
    gap = (labelled[f"score_{metric}_0"] - labelled[f"score_{metric}_1"]).drop_nulls().to_numpy()
    limit = float(np.quantile(np.abs(gap), 0.99)) if len(gap) else 0.0
    limit = limit or 1.0  # all gaps are 0
    counts, _ = np.histogram(gap, BINS, (-limit, limit))
    return Gaps(metric, limit, counts.tolist(), voting_rule.ties.get(metric, 0.0))
