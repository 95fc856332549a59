"""Scores -> votes -> labels: pure polars, no image and no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from data.artifacts.schemas import Status, labels
from label.config import HUMAN, Rule, Select, TieRule, VoteSpec
from label.voting.selection import only_extremes

KEY_DIGITS = 32
"""Digits of `data.pairs.schema.pair_key` in a pair_id, before the occurrence number."""
MOST_VOTES = 127
"""Votes are counted in int8 columns."""


@dataclass(frozen=True, slots=True)
class VotingRule:
    """Who votes and how the votes are counted."""

    spec: VoteSpec
    voters: tuple[str, ...]
    """Metrics whose votes are counted."""
    ties: Mapping[str, float] = field(default_factory=dict)
    """Metric -> largest score gap that still abstains; 0 where it is not named."""
    seed: int = 0
    """Decides the coins of `Rule.random`."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.spec.weights if name not in self.everyone]
        if unknown:
            raise ValueError(
                f"vote.weights names {unknown[0]}, which has no vote; "
                f"voters: {', '.join(self.everyone)} (panel.voters)"
            )
        total = sum(map(self.weight, self.everyone))
        if total > MOST_VOTES:
            raise ValueError(
                f"the voters have {total} votes together, more than {MOST_VOTES}; divide "
                "vote.weights by a common factor"
            )
        if self.spec.rule is Rule.at_least and self.spec.votes > total:
            each = f" with {total} votes" if self.spec.weights else ""
            raise ValueError(
                f"vote.votes={self.spec.votes} can never be reached by {len(self.everyone)} "
                f"voters{each}; lower it or add voters"
            )

    @property
    def everyone(self) -> tuple[str, ...]:
        """All voters: the metrics, then the human label where it has a vote."""
        return (*self.voters, *([HUMAN] if self.spec.human_votes else []))

    def weight(self, voter: str) -> int:
        """How many votes a voter has."""
        return int(self.spec.weights.get(voter, 1))

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that are needed: the voters, and those that the spec names."""
        named = (
            self.spec.metric if self.spec.rule is Rule.single else "",
            self.spec.tie_metric if self.spec.tie_rule is TieRule.metric else "",
        )
        return tuple(dict.fromkeys([*self.voters, *filter(None, named)]))


def label_pairs(scored: pl.DataFrame, voting_rule: VotingRule) -> pl.DataFrame:
    """Decide every pair; rows keep their order and none is lost.

    `scored` has the columns of `schemas.PAIR_FACTS` and, for each metric m of the voting rule,
    `score_m_0`, `score_m_1`, `status_m_0`, `status_m_1`. The result has those of `schemas.labels`.
    """
    frame = scored.with_columns(pair_id=unique_ids(scored["pair_id"]))
    frame = frame.with_columns(
        *[vote_of(m, voting_rule.ties.get(m, 0.0)).alias(f"vote_{m}") for m in voting_rule.metrics],
        vote_human=vote_of_human(),
        **row_status(voting_rule.metrics),
    )
    frame = frame.with_columns(**tally(voting_rule))
    frame = frame.with_columns(choice=choice(frame, voting_rule))
    frame = frame.with_columns(**decision(voting_rule))
    if voting_rule.spec.select is Select.extremes:
        frame = only_extremes(frame, tie_vote(voting_rule.spec))
    frame = frame.with_columns(margin=margin())
    return frame.select(labels(voting_rule.metrics).names)


# --- votes ---------------------------------------------------------------------------------------


def unique_ids(pair_ids: pl.Series) -> pl.Series:
    """pair_id with the occurrence number counted over the whole set instead of a shard.

    Only the few keys that occur again are counted; counting all rows takes ten times as long.
    """
    rows = pl.DataFrame({"key": pair_ids.str.slice(0, KEY_DIGITS)}).with_row_index()
    again = rows.filter(rows["key"].hash().is_duplicated())
    numbers = again.select("index", number=pl.int_range(pl.len()).over("key"))
    occurrence = pl.zeros(len(rows), pl.Int64, eager=True)
    occurrence = occurrence.scatter(numbers["index"], numbers["number"])
    return rows["key"] + "-" + occurrence.cast(pl.String)


def vote_of(metric: str, tie: float) -> pl.Expr:
    """+1 for image 0, -1 for image 1, 0 where the gap is within `tie`, null where not scored."""
    gap = pl.col(f"score_{metric}_0") - pl.col(f"score_{metric}_1")
    return pl.when(gap.abs() <= tie).then(0).otherwise(gap.sign()).cast(pl.Int8)


def vote_of_human() -> pl.Expr:
    """The human label as a vote; null where there is none."""
    return (pl.col("human") - 0.5).sign().cast(pl.Int8)


def row_status(metrics: Sequence[str]) -> dict[str, pl.Expr]:
    """The row's status and reason: a score that is not finite is an error of its row."""
    broken = [
        (pl.col(f"status_{m}_{side}") == Status.NOT_FINITE, f"{m}: score of image {side}")
        for m in metrics
        for side in (0, 1)
    ]
    any_broken = pl.any_horizontal(pl.lit(value=False), *[is_broken for is_broken, _ in broken])
    ok = pl.col("status") == Status.OK
    which = pl.concat_str(
        pl.lit("not finite"),
        *[
            pl.when(is_broken).then(pl.lit(f"; {what}")).otherwise(pl.lit(""))
            for is_broken, what in broken
        ],
    )
    return {
        "status": pl.when(ok & any_broken)
        .then(pl.lit(Status.NOT_FINITE.value))
        .otherwise("status"),
        "reason": pl.when(ok & any_broken).then(which).otherwise("reason"),
    }


def tally(voting_rule: VotingRule) -> dict[str, pl.Expr]:
    """How many votes each image has; a voter of weight w casts w of them."""
    return {
        f"votes_{image}": pl.sum_horizontal(
            (pl.col(f"vote_{voter}") == sign).fill_null(value=False).cast(pl.Int8)
            * pl.lit(voting_rule.weight(voter), pl.Int8)
            for voter in voting_rule.everyone
        ).cast(pl.Int8)
        for image, sign in ((0, 1), (1, -1))
    }


# --- rules ---------------------------------------------------------------------------------------


def choice(frame: pl.DataFrame, voting_rule: VotingRule) -> pl.Expr | pl.Series:
    """The verdict of the rule alone: > 0 for image 0, < 0 for image 1, 0 or null for neither."""
    spec = voting_rule.spec
    first, second = pl.col("votes_0"), pl.col("votes_1")
    if spec.rule is Rule.unanimous:
        return _either((first > 0) & (second == 0), (second > 0) & (first == 0))
    if spec.rule is Rule.at_least:
        return _either(
            (first >= spec.votes) & (first > second), (second >= spec.votes) & (second > first)
        )
    if spec.rule in (Rule.sum, Rule.zscore_sum):
        return total_gap(frame, voting_rule, standardised=spec.rule is Rule.zscore_sum)
    if spec.rule is Rule.random:
        return coins(frame["pair_id"], voting_rule.seed)
    if spec.rule is Rule.single:
        return pl.col(f"vote_{spec.metric}")
    return pl.col("vote_human") if spec.rule is Rule.human else first - second


def total_gap(frame: pl.DataFrame, voting_rule: VotingRule, *, standardised: bool) -> pl.Expr:
    """Weighted sum of the metrics' score gaps; standardised by each one's deviation over the set.

    A metric's mean cancels in the gap of two standardised scores, so only the deviation counts.
    """
    gaps = []
    for m in voting_rule.voters:
        gap = pl.col(f"score_{m}_0").cast(pl.Float64) - pl.col(f"score_{m}_1").cast(pl.Float64)
        if standardised:
            both = pl.concat([frame[f"score_{m}_0"], frame[f"score_{m}_1"]]).cast(pl.Float64)
            deviation = both.std(ddof=0)
            assert deviation is None or isinstance(deviation, float)
            gap = gap / deviation if deviation else gap * 0
        gaps.append(gap * voting_rule.weight(m))
    return pl.sum_horizontal(gaps, ignore_nulls=False)


def coins(pair_ids: pl.Series, seed: int) -> pl.Series:
    """+1 or -1 for each pair_id: splitmix64 of its key, its occurrence number and the seed."""
    key = pair_ids.str.slice(0, 15).str.to_integer(base=16, dtype=pl.Int64).to_numpy()
    occurrence = pair_ids.str.slice(KEY_DIGITS + 1).cast(pl.Int64).to_numpy()
    start = splitmix64(np.array([seed % 2**63], np.uint64))
    mixed = splitmix64(splitmix64(key.astype(np.uint64) ^ start) ^ occurrence.astype(np.uint64))
    return pl.Series(np.where(mixed >> np.uint64(63), 1, -1).astype(np.int8))


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's mixer (2014): every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def decision(voting_rule: VotingRule) -> dict[str, pl.Expr]:
    """`winner` and `decided_by`: the rule, else the tie rule, else why neither could."""
    spec = voting_rule.spec
    ok = pl.col("status") == Status.OK
    by_rule = ok & pl.col("choice").fill_null(0).ne(0)
    by_tie_rule = ok & ~by_rule & tie_vote(spec).ne(0)
    tie_name = HUMAN if spec.tie_rule is TieRule.human else f"metric:{spec.tie_metric}"
    sign = pl.when(by_rule).then(pl.col("choice").sign()).when(by_tie_rule).then(tie_vote(spec))
    return {
        "winner": pl.when(sign > 0).then(0).when(sign < 0).then(1).cast(pl.Int8),
        "decided_by": pl.when(~ok)
        .then("status")
        .when(by_rule)
        .then(pl.lit(spec.rule.value))
        .when(by_tie_rule)
        .then(pl.lit(tie_name))
        .otherwise(undecided(spec)),
    }


def tie_vote(spec: VoteSpec) -> pl.Expr:
    """The tie rule's vote: +1 for image 0, -1 for image 1, 0 for none."""
    if spec.tie_rule is TieRule.drop:
        return pl.lit(0)
    return pl.col(
        "vote_human" if spec.tie_rule is TieRule.human else f"vote_{spec.tie_metric}"
    ).fill_null(0)


def undecided(spec: VoteSpec) -> pl.Expr:
    """Why a rule decided nothing, in one word."""
    if spec.rule is Rule.human:
        return (
            pl.when(pl.col("human").is_null())
            .then(pl.lit("no_human_label"))
            .otherwise(pl.lit("tie"))
        )
    words = {Rule.unanimous: "not_unanimous", Rule.at_least: "too_few_votes"}
    even = pl.col("votes_0") == pl.col("votes_1")
    return pl.when(even).then(pl.lit("tie")).otherwise(pl.lit(words.get(spec.rule, "tie")))


def margin() -> pl.Expr:
    """The winner's lead in votes; below 0 where the votes were overruled.

    Without a winner, the lead of the image with more votes.
    """
    lead = pl.col("votes_0") - pl.col("votes_1")
    return (
        pl.when(pl.col("winner") == 0)
        .then(lead)
        .when(pl.col("winner") == 1)
        .then(-lead)
        .otherwise(lead.abs())
        .cast(pl.Int8)
    )


def _either(first: pl.Expr, second: pl.Expr) -> pl.Expr:
    return pl.when(first).then(1).when(second).then(-1).otherwise(0).cast(pl.Int8)
