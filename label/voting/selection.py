"""Which decided pairs of a prompt become labels: all of them, or the pair of its extremes.

Several images of a prompt play a tournament in which each of their pairs is a match. Copeland's
count (1951) of an image is its wins, a match without a winner counting a half for both.
"""

import polars as pl

from data.artifacts.schemas import Status

NOT_EXTREME = "not_extreme"
"""`decided_by` of a pair that has a winner but was not selected."""
PLAYED = (pl.col("status") == Status.OK) & (pl.col("image_0") != pl.col("image_1"))
"""The pair was scored and has two images."""
SIGN = 1 - 2 * pl.col("winner").cast(pl.Int64)
"""+1 where image 0 won, -1 where image 1 did, null without a winner."""


def only_extremes(frame: pl.DataFrame, tie_vote: pl.Expr) -> pl.DataFrame:
    """Keep the winner of one pair a prompt: that between the images with most and fewest wins.

    Of the pairs that exist it is the one with the largest `C(winner) - C(loser)`, where C is
    `copeland_counts`. That difference must be above 0, or 0 with the tie rule on the winner's
    side: in a cycle no image is an extreme. Equal differences are decided by the tie rule, then by
    the winner's lead in votes, then by the order of the images' names. The other pairs keep their
    rows, without a winner and with `decided_by` NOT_EXTREME.

    Args:
        frame: Pairs with `prompt`, `image_0`, `image_1`, `status`, `votes_0`, `votes_1`, `winner`
            and `decided_by`. An image without a name counts as one of its own.
        tie_vote: The tie rule's vote on each pair, +1 for image 0, -1 for image 1, 0 for none.
    """
    named = frame.select(
        "prompt", "status", "winner", "votes_0", "votes_1",
        *[_name_of(side) for side in (0, 1)], tie_vote.alias("tie_vote"),
    ).with_row_index("pair")  # fmt: skip
    counts = copeland_counts(named)
    for side in (0, 1):
        keys = ["prompt", f"image_{side}"]
        renamed = counts.rename({"image": f"image_{side}", "half_wins": f"half_wins_{side}"})
        named = named.join(renamed, on=keys, how="left", maintain_order="left")
    selected = named["pair"].is_in(_best_pairs(named).implode())
    has_winner = pl.col("winner").is_not_null()
    return frame.with_columns(
        winner=pl.when(selected).then("winner"),
        decided_by=pl.when(has_winner & ~selected)
        .then(pl.lit(NOT_EXTREME))
        .otherwise("decided_by"),
    )


def copeland_counts(frame: pl.DataFrame) -> pl.DataFrame:
    """Copeland's count of each image of each prompt, doubled: `half_wins` is 2 wins + 1 ties.

    Only pairs that were scored count, each as often as it occurs.
    """
    points = 1 + SIGN.fill_null(0)
    matches = frame.filter(PLAYED)
    sides = [
        matches.select("prompt", image=f"image_{side}", half_wins=gained)
        for side, gained in ((0, points), (1, 2 - points))
    ]
    return pl.concat(sides).group_by("prompt", "image").agg(pl.col("half_wins").sum())


def _best_pairs(named: pl.DataFrame) -> pl.Series:
    """The number of the selected pair of each prompt that has one."""
    gained = SIGN * (pl.col("half_wins_0") - pl.col("half_wins_1"))
    supported = SIGN * pl.col("tie_vote").fill_null(0).cast(pl.Int64)
    lead = SIGN * (pl.col("votes_0").cast(pl.Int64) - pl.col("votes_1"))
    names = [pl.col("image_0"), pl.col("image_1")]
    ranked = named.filter(PLAYED, pl.col("winner").is_not_null()).select(
        "pair", "prompt", gained=gained, supported=supported, lead=lead,
        first=pl.min_horizontal(names), second=pl.max_horizontal(names),
    )  # fmt: skip
    by_rule = (pl.col("gained") == 0) & (pl.col("supported") > 0)
    ranked = ranked.filter((pl.col("gained") > 0) | by_rule)
    order = ["gained", "supported", "lead", "first", "second", "pair"]
    ranked = ranked.sort(order, descending=[True] * 3 + [False] * 3)
    return ranked.unique("prompt", keep="first", maintain_order=True)["pair"]


def _name_of(side: int) -> pl.Expr:
    """An image's name in the pair set; one without a name gets its own."""
    nameless = pl.format(f"\0{{}}/{side}", "pair_id")
    return pl.coalesce(f"image_{side}", nameless).alias(f"image_{side}")
