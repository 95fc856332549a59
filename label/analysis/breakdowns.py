"""What became of the pairs: how they were decided, how clearly, by whom, and of which images."""

import polars as pl

from label.analysis.agreement import (
    DECIDED,
    HUMAN_CHOSE,
    HUMAN_VOTE,
    JUDGED,
    LABEL_AGREES,
    num_pairs,
    rate,
)
from label.voting.rules import VotingRule
from label.voting.selection import NOT_EXTREME

OK = pl.col("status") == "ok"


def margins(counted: pl.DataFrame) -> pl.DataFrame:
    """Pairs by lead in votes, whichever image leads.

    `flips` is the fraction of labels that differ from the human choice, among the pairs that have
    both and where the choice did not make the label.
    """
    lead = (pl.col("votes_0").cast(pl.Int64) - pl.col("votes_1")).abs()
    judged, flipped = _sum(JUDGED), _sum(JUDGED & ~LABEL_AGREES)
    grouped = counted.filter(OK).group_by(margin=lead)
    return grouped.agg(pl.col("pairs").sum(), flips=_fraction(flipped, judged)).sort("margin")


def ties(counted: pl.DataFrame, rule: str) -> pl.DataFrame:
    """Scored pairs that the rule left open: the count of votes, and what came of them.

    Decided pairs that were not selected are no ties. `human` is the fraction that agrees with
    people, of those decided after all but not by people.
    """
    counts = [pl.col("votes_0"), pl.col("votes_1")]
    tally = pl.format("{} : {}", pl.max_horizontal(counts), pl.min_horizontal(counts))
    agreeing, judged = _sum(JUDGED & LABEL_AGREES), _sum(JUDGED)
    return (
        counted.filter(OK, ~pl.col("decided_by").is_in([rule, NOT_EXTREME]))
        .group_by(votes=tally, outcome="decided_by")
        .agg(pl.col("pairs").sum(), human=_fraction(agreeing, judged))
        .sort("pairs", "votes", "outcome", descending=[True, True, False])
    )


def leave_one_out(counted: pl.DataFrame, voting_rule: VotingRule) -> pl.DataFrame:
    """What the majority of the others would say without each voter; first, with all of them.

    `ties_broken` are ties that would be decided, `ties_made` decided pairs that would tie, and
    `reversed` pairs that would have the other winner (only where a voter has several votes). With
    an even number of votes only ties are near enough to change; with an odd number only leads of
    one. `human` is the agreement of this majority with the human choice, `human_broken` the
    same on `ties_broken` alone, where 0.5 is a coin's.
    """
    usable = counted.filter(OK).with_columns(everyone=majority(voting_rule, without="nobody"))
    everyone, rest, human = pl.col("everyone"), pl.col("rest"), pl.col("vote_human")
    broken = (everyone == 0) & (rest != 0)
    rows = []
    for voter in ("nobody", *voting_rule.everyone):
        frame = usable.with_columns(rest=majority(voting_rule, without=voter))
        rows.append(
            {
                "without": voter,
                "ties_broken": num_pairs(frame, broken),
                "ties_made": num_pairs(frame, everyone != 0, rest == 0),
                "reversed": num_pairs(frame, everyone * rest == -1),
                "human": rate(frame, rest == human, rest != 0, HUMAN_CHOSE),
                "human_broken": rate(frame, rest == human, broken, HUMAN_CHOSE),
            }
        )
    return pl.DataFrame(rows)


def majority(voting_rule: VotingRule, without: str) -> pl.Expr:
    """The image that the other voters' votes prefer: +1, -1, or 0 for a tie."""
    votes = [
        pl.col(f"vote_{voter}").fill_null(0).cast(pl.Int64) * voting_rule.weight(voter)
        for voter in voting_rule.everyone
        if voter != without
    ]
    return pl.sum_horizontal(pl.lit(0, pl.Int64), *votes).sign()


def coalitions(counted: pl.DataFrame, voting_rule: VotingRule, limit: int) -> pl.DataFrame:
    """Who votes with whom: the commonest divisions of the voters, whichever image they chose.

    `ahead` has more votes than `behind`, or as many and the first voter. `human_ahead` is the
    fraction of human choices that side with `ahead`.
    """
    names, winning = voting_rule.everyone, majority(voting_rule, without="nobody")
    votes = [pl.col(f"vote_{voter}").fill_null(0) for voter in names]
    first = pl.coalesce(pl.when(vote != 0).then(vote) for vote in votes).fill_null(1)
    sign = pl.when(winning != 0).then(winning).otherwise(first)

    def camp(side: pl.Expr) -> pl.Expr:
        members = [
            pl.when(vote == side).then(pl.lit(n)) for n, vote in zip(names, votes, strict=True)
        ]
        return pl.concat_str(members, separator=", ", ignore_nulls=True)

    agreeing = _sum(HUMAN_CHOSE & (pl.col("vote_human") == sign))
    frame = (
        counted.filter(OK)
        .group_by(ahead=camp(sign), behind=camp(-sign), abstain=camp(pl.lit(0)))
        .agg(pl.col("pairs").sum(), human_ahead=_fraction(agreeing, _sum(HUMAN_CHOSE)))
    )
    return frame.sort("pairs", "ahead", descending=[True, False]).head(limit)


# --- which rows and which images -----------------------------------------------------------------


def reasons(labelled: pl.DataFrame, limit: int) -> pl.DataFrame:
    """The commonest kinds of reason why rows have no label, and how many rows have each.

    Reasons that differ in numbers alone are of one kind: `image N: ... (N bytes not processed)`.
    """
    kind = pl.col("reason").str.replace_all(r"\d+", "N")
    bad = labelled.filter(~OK).group_by("status", kind).agg(pairs=pl.len().cast(pl.Int64))
    return bad.sort("pairs", "status", "reason", descending=[True, False, False]).head(limit)


def by_size(labelled: pl.DataFrame, limit: int) -> pl.DataFrame:
    """Pairs by the size of their images, the commonest sizes first."""
    equal = (pl.col("width_0") == pl.col("width_1")) & (pl.col("height_0") == pl.col("height_1"))
    size = pl.format("{} x {}", "width_0", "height_0")
    size = pl.when(equal).then(size).otherwise(pl.lit("two sizes"))
    return _grouped(labelled, size.alias("size"), limit)


def by_generator(labelled: pl.DataFrame, generators: pl.DataFrame, limit: int) -> pl.DataFrame:
    """Pairs by the models that generated their images, in either order; the commonest first.

    `generators` has `generator_0` and `generator_1`, row for row. `first_wins` is the fraction of
    decided pairs that the model named first wins; null where both images are of one model.
    """
    one, other = pl.col("generator_0"), pl.col("generator_1")
    known = pl.concat([labelled, generators], how="horizontal").drop_nulls(generators.columns)
    names = [pl.min_horizontal(one, other), pl.max_horizontal(one, other)]
    first_won = DECIDED & (pl.col("winner") == (one > other).cast(pl.Int8))
    wins = pl.when((one != other).any()).then(_fraction(first_won.sum(), DECIDED.sum()))
    generated = pl.concat_str(names, separator=" / ").alias("generators")
    return _grouped(known, generated, limit, first_wins=wins)


def _grouped(labelled: pl.DataFrame, group: pl.Expr, limit: int, **more: pl.Expr) -> pl.DataFrame:
    """Scored pairs by group: decided, unanimous (nobody against it), the human view."""
    one_sided = DECIDED & (pl.min_horizontal("votes_0", "votes_1") == 0)
    grouped = labelled.with_columns(vote_human=HUMAN_VOTE).filter(OK).group_by(group)
    frame = grouped.agg(
        pairs=pl.len().cast(pl.Int64),
        **more,
        decided=DECIDED.mean(),
        unanimous=one_sided.mean(),
        human=_fraction((JUDGED & LABEL_AGREES).sum(), JUDGED.sum()),
    )
    name = group.meta.output_name()
    return frame.sort("pairs", name, descending=[True, False]).head(limit)


def _sum(condition: pl.Expr) -> pl.Expr:
    """Pairs of a group of ballots that meet a condition."""
    return pl.col("pairs").filter(condition).sum()


def _fraction(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    """A fraction, null where there is nothing to divide by."""
    return pl.when(whole > 0).then(part / whole)
