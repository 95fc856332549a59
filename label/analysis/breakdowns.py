"""What became of the pairs: how they were decided, how clearly, where, and by whom."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from label.analysis.agreement import (
    DECIDED,
    JUDGED,
    effective_voters,
    fleiss_kappa,
    krippendorff_alpha,
    metrics_of,
    num_pairs,
    rate,
    side,
    voted,
)
from label.config import HUMAN
from label.voting.rules import VotingRule

OK = pl.col("status") == "ok"
SQUARE = 1.05
"""Images count as square up to this ratio of their sides."""


def overall(counted: pl.DataFrame) -> dict[str, Any]:
    """Numbers of the whole set: decided pairs, the winner's side, people, coefficients.

    `winner_side_0` is 0.5 without a position bias; `human_side_0` is people's own. Agreement and
    flips leave out what the human label itself decided.
    """
    agrees = side("winner") == pl.col("vote_human")
    return {
        "pairs": num_pairs(counted),
        "decided": num_pairs(counted, DECIDED),
        "winner_side_0": rate(counted, pl.col("winner") == 0, DECIDED),
        "human_side_0": rate(counted, pl.col("vote_human") == 1, voted(HUMAN)),
        "human_choices": num_pairs(counted, voted(HUMAN)),
        "human_ties": num_pairs(counted, pl.col("vote_human") == 0),
        "human_agreement": rate(counted, agrees, JUDGED),
        "flips": num_pairs(counted, ~agrees, JUDGED),
        "fleiss_kappa": fleiss_kappa(counted),
        "krippendorff_alpha": krippendorff_alpha(counted),
        "effective_voters": effective_voters(counted),
    }


def margins(counted: pl.DataFrame) -> pl.DataFrame:
    """Pairs by lead in votes (without sign): how many, how many decided, and the human's view.

    `human` counts pairs with a winner and a human choice that did not make it; `flips` is the share
    of those where the two differ. 0.3 to 0.4 is usual for scorers, and not much less for people.
    """
    lead = (pl.col("votes_0").cast(pl.Int64) - pl.col("votes_1")).abs()
    flipped = JUDGED & (side("winner") != pl.col("vote_human"))
    return (
        counted.filter(OK)
        .group_by(margin=lead)
        .agg(
            pairs=pl.col("pairs").sum(),
            decided=pl.col("pairs").filter(DECIDED).sum(),
            human=pl.col("pairs").filter(JUDGED).sum(),
            flips=pl.col("pairs").filter(flipped).sum(),
        )
        .with_columns(flips=pl.when(pl.col("human") > 0).then(pl.col("flips") / pl.col("human")))
        .sort("margin")
    )


def ties(counted: pl.DataFrame, rule: str) -> pl.DataFrame:
    """Scored pairs that the rule left open: the count of votes, and what came of them.

    `human` is the share of those decided after all, and not by people, that agree with people.
    """
    counts = [pl.col("votes_0"), pl.col("votes_1")]
    agrees = JUDGED & (side("winner") == pl.col("vote_human"))
    return (
        counted.filter(OK, pl.col("decided_by") != rule)
        .group_by(
            votes=pl.format("{} : {}", pl.max_horizontal(counts), pl.min_horizontal(counts)),
            outcome="decided_by",
            decided=DECIDED,
        )
        .agg(
            pl.col("pairs").sum(),
            human=pl.col("pairs").filter(agrees).sum(),
            judged=pl.col("pairs").filter(JUDGED).sum(),
        )
        .with_columns(human=pl.when(pl.col("judged") > 0).then(pl.col("human") / pl.col("judged")))
        .sort("pairs", "votes", "outcome", descending=[True, True, False])
        .select("votes", "outcome", "decided", "pairs", "human")
    )


# --- who is needed -------------------------------------------------------------------------------


def leave_one_out(counted: pl.DataFrame, voting_rule: VotingRule) -> pl.DataFrame:
    """What the majority of the others would say if a voter stayed away; first, if nobody did.

    `ties_made` are decided pairs that would tie, `ties_broken` ties that would be decided,
    `reversed` pairs that would have the other winner (only where someone has several votes), and
    `changed` the share of all these. With an even number of votes only ties are near enough to
    change; with an odd number only leads of one. `human` is the agreement of this majority with the
    human choice, `human_broken` the same on `ties_broken` alone: near 0.5 they are a coin's.
    """
    usable = counted.filter(OK).with_columns(everyone=majority(voting_rule, voting_rule.everyone))
    everyone, rest, human = pl.col("everyone"), pl.col("rest"), pl.col("vote_human")
    broken = (everyone == 0) & (rest != 0)
    rows = []
    for voter in ("nobody", *voting_rule.everyone):
        others = [name for name in voting_rule.everyone if name != voter]
        frame = usable.with_columns(rest=majority(voting_rule, others))
        rows.append(
            {
                "without": voter,
                "changed": rate(frame, everyone != rest),
                "ties_made": num_pairs(frame, everyone != 0, rest == 0),
                "ties_broken": num_pairs(frame, broken),
                "reversed": num_pairs(frame, everyone * rest == -1),
                "human": rate(frame, rest == human, rest != 0, voted(HUMAN)),
                "human_broken": rate(frame, rest == human, broken, voted(HUMAN)),
            }
        )
    return pl.DataFrame(rows, schema=LEAVE_ONE_OUT)


LEAVE_ONE_OUT = {
    "without": pl.String,
    "changed": pl.Float64,
    "ties_made": pl.Int64,
    "ties_broken": pl.Int64,
    "reversed": pl.Int64,
    "human": pl.Float64,
    "human_broken": pl.Float64,
}


def majority(voting_rule: VotingRule, voters: tuple[str, ...] | list[str]) -> pl.Expr:
    """+1, -1 or 0: which image these voters' votes prefer."""
    votes = [
        pl.col(f"vote_{voter}").fill_null(0).cast(pl.Int64) * voting_rule.weight(voter)
        for voter in voters
    ]
    return pl.sum_horizontal(pl.lit(0, pl.Int64), *votes).sign()


def coalitions(counted: pl.DataFrame, voting_rule: VotingRule, most: int) -> pl.DataFrame:
    """Who votes with whom: the commonest divisions of the voters, whichever image they chose.

    `ahead` has more votes than `behind`, or as many and the first voter. `human` is the share of
    the human choices that side with `ahead`.
    """
    found: dict[tuple[str, ...], list[int]] = {}
    for row in counted.filter(OK).iter_rows(named=True):
        camps = {s: [v for v in voting_rule.everyone if row[f"vote_{v}"] == s] for s in (1, -1, 0)}
        lead = sum(map(voting_rule.weight, camps[1])) - sum(map(voting_rule.weight, camps[-1]))
        first = next((row[f"vote_{v}"] for v in voting_rule.everyone if row[f"vote_{v}"]), 1)
        sign = (lead > 0) - (lead < 0) or first
        key = tuple(", ".join(camps[s]) for s in (sign, -sign, 0))
        sums = found.setdefault(key, [0, 0, 0])
        human = row["vote_human"]
        for i, counts in enumerate((True, bool(human), human == sign)):
            sums[i] += row["pairs"] * counts
    rows = [
        {
            **dict(zip(("ahead", "behind", "abstain"), key, strict=True)),
            "pairs": pairs,
            "human": with_ahead / judged if judged else None,
        }
        for key, (pairs, judged, with_ahead) in found.items()
    ]
    return pl.DataFrame(rows, schema=COALITIONS).sort("pairs", descending=True).head(most)


COALITIONS = {
    "ahead": pl.String,
    "behind": pl.String,
    "abstain": pl.String,
    "pairs": pl.Int64,
    "human": pl.Float64,
}


# --- where ---------------------------------------------------------------------------------------


def reasons(labelled: pl.DataFrame, most: int) -> pl.DataFrame:
    """The commonest kinds of reason why rows have no label, and how many rows have each.

    Reasons that differ in numbers alone are of one kind: `image N: ... (N bytes not processed)`.
    """
    kind = pl.col("reason").str.replace_all(r"\d+", "N")
    bad = labelled.filter(~OK).group_by("status", kind).agg(pairs=pl.len().cast(pl.Int64))
    return bad.sort("pairs", "status", "reason", descending=[True, False, False]).head(most)


def by_size(labelled: pl.DataFrame, most: int) -> pl.DataFrame:
    """Pairs by the size of their images, the commonest sizes first."""
    equal = (pl.col("width_0") == pl.col("width_1")) & (pl.col("height_0") == pl.col("height_1"))
    size = pl.format("{} x {}", "width_0", "height_0")
    return _grouped(labelled, pl.when(equal).then(size).otherwise(pl.lit("two sizes")), most)


def by_shape(labelled: pl.DataFrame) -> pl.DataFrame:
    """Pairs by the shape of their images: square, wide or tall."""
    shapes = []
    for image in (0, 1):
        ratio = pl.col(f"width_{image}") / pl.col(f"height_{image}")
        wide_or_not = pl.when(ratio > SQUARE).then(pl.lit("wide")).otherwise(pl.lit("square"))
        shapes.append(pl.when(ratio < 1 / SQUARE).then(pl.lit("tall")).otherwise(wide_or_not))
    one = pl.when(shapes[0] == shapes[1]).then(shapes[0]).otherwise(pl.lit("two shapes"))
    return _grouped(labelled, one, 4)


def by_generator(labelled: pl.DataFrame, generators: pl.DataFrame) -> pl.DataFrame:
    """Pairs by what made their images, in either order; `generators` is row-aligned.

    `first_wins` is the share of decided pairs won by the one that is named first.
    """
    one, other = generators["generator_0"], generators["generator_1"]
    frame = labelled.with_columns(one=one, other=other)
    swapped = pl.col("one") > pl.col("other")
    names = [pl.when(swapped).then("other").otherwise("one"),
             pl.when(swapped).then("one").otherwise("other")]  # fmt: skip
    first_won = pl.col("winner") == swapped.cast(pl.Int8)
    known = frame.filter(pl.col("one").is_not_null(), pl.col("other").is_not_null())
    made_by = pl.concat_str(names, separator=" / ")
    two = (pl.col("one") != pl.col("other")).any() & DECIDED.any()
    wins = pl.when(two).then(first_won.sum() / DECIDED.sum())
    return _grouped(known, made_by, len(known), first_wins=wins)


def larger_wins(labelled: pl.DataFrame) -> Mapping[str, float | None]:
    """Who prefers the larger image of a pair, and how often: the label, people, each metric.

    0.5 without a bias for resolution; None where no pair's images differ in pixels.
    """
    area = [pl.col(f"width_{i}").cast(pl.Int64) * pl.col(f"height_{i}") for i in (0, 1)]
    frame = labelled.filter(OK, area[0] != area[1])
    bigger = (area[0] - area[1]).sign()
    votes = {
        "label": side("winner"),
        HUMAN: (pl.col("human") - 0.5).sign(),
        **{m: pl.col(f"vote_{m}") for m in metrics_of(labelled)},
    }
    chosen = frame.select(
        (vote == bigger).filter(vote != 0).mean().alias(name) for name, vote in votes.items()
    )
    return {str(name): share for name, share in chosen.row(0, named=True).items()}


def _grouped(labelled: pl.DataFrame, group: pl.Expr, most: int, **more: pl.Expr) -> pl.DataFrame:
    """Scored pairs by group: decided, unanimous (nobody against it), the human view."""
    labelled = labelled.with_columns(vote_human=(pl.col("human") - 0.5).sign().cast(pl.Int8))
    agrees = JUDGED & (side("winner") == pl.col("vote_human"))
    one_sided = DECIDED & (pl.min_horizontal("votes_0", "votes_1") == 0)
    return (
        labelled.filter(OK)
        .group_by(group=group)
        .agg(
            pairs=pl.len().cast(pl.Int64),
            decided=DECIDED.mean(),
            unanimous=one_sided.mean(),
            side_0=pl.when(DECIDED.any()).then((pl.col("winner") == 0).sum() / DECIDED.sum()),
            human=pl.when(JUDGED.any()).then(agrees.sum() / JUDGED.sum()),
            **more,
        )
        .sort("pairs", "group", descending=[True, False])
        .head(most)
    )
