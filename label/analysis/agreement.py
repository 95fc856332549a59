"""Who agrees with whom; pure polars and numpy.

A vote is +1 (image 0), -1 (image 1), 0 (abstention) or null (not scored). A million pairs have a
few hundred distinct combinations of votes and outcome: `ballots` counts them once, and the other
functions work on the counts.
"""

import numpy as np
import polars as pl

from data.artifacts.votes import equal_votes
from label.config import HUMAN

OUTCOME = ("vote_human", "votes_0", "votes_1", "winner", "decided_by", "status")
HUMAN_VOTE = (pl.col("human") - 0.5).sign().cast(pl.Int8)
"""The human label as a vote; null where nobody chose."""
HUMAN_CHOSE = pl.col("vote_human") != 0
"""People chose one of the images."""
DECIDED = pl.col("winner").is_not_null()
LABEL_VOTE = 1 - 2 * pl.col("winner").cast(pl.Int8)
"""The label as a vote; null where there is no winner."""
JUDGED = DECIDED & HUMAN_CHOSE & (pl.col("decided_by") != HUMAN)
"""The pair has a winner and a human choice, and the one did not come from the other."""
LABEL_AGREES = pl.col("vote_human") == LABEL_VOTE


def metrics_of(labelled: pl.DataFrame) -> list[str]:
    """The metrics of a label set (or of its ballots), in its column order."""
    names = (name.removeprefix("vote_") for name in labelled.columns if name.startswith("vote_"))
    return [name for name in names if name != HUMAN]


def ballots(labelled: pl.DataFrame) -> pl.DataFrame:
    """Every combination of votes and outcome, with the number of pairs that have it."""
    keys = [*(f"vote_{m}" for m in metrics_of(labelled)), *OUTCOME]
    counted = labelled.with_columns(vote_human=HUMAN_VOTE).group_by(keys)
    frame = counted.agg(pairs=pl.len().cast(pl.Int64))
    return frame.sort("pairs", *keys, descending=[True, *[False] * len(keys)])


def voters_of(counted: pl.DataFrame) -> list[str]:
    """The metrics, then `human` if people chose an image anywhere."""
    return [*metrics_of(counted), *([HUMAN] if num_pairs(counted, HUMAN_CHOSE) else [])]


def num_pairs(counted: pl.DataFrame, *conditions: pl.Expr) -> int:
    """How many pairs meet all conditions."""
    return int(counted.filter(*conditions)["pairs"].sum())


def rate(counted: pl.DataFrame, event: pl.Expr, *among: pl.Expr) -> float | None:
    """Among the pairs that meet the conditions, the fraction with an event; None if none do."""
    total = num_pairs(counted, *among)
    return num_pairs(counted, *among, event) / total if total else None


def agreement_matrix(counted: pl.DataFrame) -> pl.DataFrame:
    """Fraction of equal votes of each two voters, where neither abstains.

    One row and one column a voter; null on the diagonal and where no pair can be compared.
    """
    names = voters_of(counted)
    matrix = equal_votes(_votes(counted, names), counted["pairs"].to_numpy())
    np.fill_diagonal(matrix, np.nan)
    frame = pl.DataFrame(matrix, schema=names).fill_nan(None)
    return frame.insert_column(0, pl.Series("voter", names, pl.String))


def voters(counted: pl.DataFrame) -> pl.DataFrame:
    """Each metric, people, and the label that came of the vote.

    `coverage` is the fraction of pairs with an answer, `abstains` the fraction of answers that are
    no vote, `side_0` the fraction of votes for image 0 (0.5 without a position bias); `human` and
    `label` are the fractions of votes that agree with the human choice and with the label. Labels
    that the human choice decided do not count as agreement between the two.
    """
    votes = {name: pl.col(f"vote_{name}") for name in voters_of(counted)} | {"label": LABEL_VOTE}
    own = pl.col("decided_by") != HUMAN
    rows = []
    for voter, vote in votes.items():
        with_label = JUDGED if voter == HUMAN else DECIDED
        with_human = (HUMAN_CHOSE, own) if voter == "label" else (HUMAN_CHOSE,)
        human = rate(counted, vote == pl.col("vote_human"), vote != 0, *with_human)
        label = rate(counted, vote == LABEL_VOTE, vote != 0, with_label)
        rows.append(
            {
                "voter": voter,
                "coverage": rate(counted, vote.is_not_null()),
                "abstains": rate(counted, vote == 0, vote.is_not_null()),
                "side_0": rate(counted, vote == 1, vote != 0),
                "human": None if voter == HUMAN else human,
                "label": None if voter == "label" else label,
            }
        )
    return pl.DataFrame(rows)


def krippendorff_alpha(counted: pl.DataFrame) -> float | None:
    """Agreement of all metrics beyond chance (Krippendorff 2011, nominal data).

    An abstention or a missing score is no answer, and pairs with fewer than two votes do not count;
    Fleiss' kappa needs the same number of answers on every pair.
    """
    votes, pairs = _votes(counted, metrics_of(counted)), counted["pairs"].to_numpy()
    first, second = ((votes == sign).sum(axis=1) for sign in (1, -1))
    answers = first + second
    paired = answers > 1
    first, second, answers, pairs = first[paired], second[paired], answers[paired], pairs[paired]
    chance = float(first @ pairs) * float(second @ pairs)
    if not chance:
        return None
    disagreement = float((first * second / (answers - 1)) @ pairs)
    return 1 - (float(answers @ pairs) - 1) * disagreement / chance


def _votes(counted: pl.DataFrame, names: list[str]) -> np.ndarray:
    """(combination, voter) +1, -1, or 0 for no vote."""
    return counted.select(pl.col(f"vote_{name}").fill_null(0) for name in names).to_numpy()
