"""What the scorers agree on: statistics of votes; pure polars and numpy.

A vote is +1 (image 0), -1 (image 1), 0 (abstains) or null (not scored). Two voters are compared on
the pairs where neither abstains. A million pairs have a few hundred different combinations of
votes: `ballots` counts them once, and everything else is computed on the counts.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import polars as pl

from label.config import HUMAN

OUTCOME = ("vote_human", "votes_0", "votes_1", "winner", "decided_by", "status")


def metrics_of(labelled: pl.DataFrame) -> list[str]:
    """The metrics of a label set (or of its ballots), in its column order."""
    names = (name.removeprefix("vote_") for name in labelled.columns if name.startswith("vote_"))
    return [name for name in names if name != HUMAN]


def ballots(labelled: pl.DataFrame) -> pl.DataFrame:
    """Every combination of votes and outcome, `pairs` being how many pairs have it."""
    frame = labelled.with_columns(vote_human=(pl.col("human") - 0.5).sign().cast(pl.Int8))
    keys = [*(f"vote_{m}" for m in metrics_of(labelled)), *OUTCOME]
    counted = frame.group_by(keys).agg(pairs=pl.len().cast(pl.Int64))
    return counted.sort("pairs", *keys, descending=[True, *[False] * len(keys)])


def voted(name: str) -> pl.Expr:
    """Whether a voter voted for one of the images."""
    return pl.col(f"vote_{name}").fill_null(0) != 0


def num_pairs(counted: pl.DataFrame, *conditions: pl.Expr) -> int:
    """How many pairs meet all conditions."""
    return int(counted.filter(*conditions)["pairs"].sum())


def rate(counted: pl.DataFrame, event: pl.Expr, *among: pl.Expr) -> float | None:
    """The share of pairs with an event among those that meet the conditions; None of none."""
    total = num_pairs(counted, *among)
    return num_pairs(counted, *among, event) / total if total else None


# --- voters by twos ------------------------------------------------------------------------------


def pairwise(counted: pl.DataFrame, ranks: Mapping[tuple[str, str], float | None]) -> pl.DataFrame:
    """Each pair of metrics: share of equal votes, Cohen's kappa, correlation of score gaps."""
    rows = []
    for left, right in combinations(metrics_of(counted), 2):
        table = contingency(counted, left, right)
        rows.append(
            {
                "metric_a": left,
                "metric_b": right,
                "pairs": int(table.sum()),
                "agreement": equal_share(table),
                "kappa": cohen_kappa(table),
                "spearman": ranks.get((left, right)),
            }
        )
    return pl.DataFrame(rows, schema=PAIRWISE)


PAIRWISE = {
    "metric_a": pl.String,
    "metric_b": pl.String,
    "pairs": pl.Int64,
    "agreement": pl.Float64,
    "kappa": pl.Float64,
    "spearman": pl.Float64,
}


def contingency(counted: pl.DataFrame, left: str, right: str) -> np.ndarray:
    """Pairs by the votes of two voters, (+1 and -1 of left, +1 and -1 of right)."""
    cells = [
        num_pairs(counted, pl.col(f"vote_{left}") == one, pl.col(f"vote_{right}") == other)
        for one in (1, -1)
        for other in (1, -1)
    ]
    return np.array(cells, dtype=np.int64).reshape(2, 2)


def equal_share(table: np.ndarray) -> float | None:
    """The share of equal votes in a contingency table."""
    return float(np.trace(table) / table.sum()) if table.sum() else None


def cohen_kappa(table: np.ndarray) -> float | None:
    """Agreement beyond chance of two voters (Cohen 1960); None where chance alone would agree."""
    if not table.sum():
        return None
    shares = table / table.sum()
    expected = float(shares.sum(axis=1) @ shares.sum(axis=0))
    return None if expected == 1 else float((np.trace(shares) - expected) / (1 - expected))


def matrices(counted: pl.DataFrame) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names (the human label last, if any), shares of equal votes, and Cohen's kappas; NaN is none.

    Both matrices are symmetric.
    """
    names = metrics_of(counted)
    if num_pairs(counted, voted(HUMAN)):
        names = [*names, HUMAN]
    shares, kappas = np.eye(len(names)), np.eye(len(names))
    for (i, left), (j, right) in combinations(enumerate(names), 2):
        table = contingency(counted, left, right)
        for matrix, found in ((shares, equal_share(table)), (kappas, cohen_kappa(table))):
            matrix[i, j] = matrix[j, i] = np.nan if found is None else found
    return names, shares, kappas


def rank_correlations(labelled: pl.DataFrame) -> dict[tuple[str, str], float | None]:
    """Spearman's correlation of every two metrics' score gaps, over the pairs that all scored.

    Each metric is ranked once; the ranks' Pearson correlation is Spearman's.
    """
    names = metrics_of(labelled)
    gaps = labelled.filter(pl.col("status") == "ok").select(
        (pl.col(f"score_{m}_0") - pl.col(f"score_{m}_1")).alias(m) for m in names
    )
    ranks = gaps.drop_nulls().select(pl.all().rank())
    found = {}
    for left, right in combinations(names, 2):
        value = ranks.select(pl.corr(left, right)).item() if len(ranks) > 1 else None
        found[left, right] = None if value is None or np.isnan(value) else float(value)
    return found


# --- each by itself ------------------------------------------------------------------------------


def per_metric(counted: pl.DataFrame) -> pl.DataFrame:
    """Each metric by itself: what it covers, whether it has a side, whom it agrees with.

    `coverage` is the share of pairs with both scores, `abstains` the share of those without a
    vote, `votes` counts its votes, `side_0` is the share of them for image 0 (0.5 without a
    position bias), `human` and `winner` the shares of them that agree with the human choice and
    with the label.
    """
    rows = []
    for metric in metrics_of(counted):
        vote, votes = pl.col(f"vote_{metric}"), voted(metric)
        rows.append(
            {
                "metric": metric,
                "coverage": rate(counted, vote.is_not_null()),
                "abstains": rate(counted, vote == 0, vote.is_not_null()),
                "votes": num_pairs(counted, votes),
                "side_0": rate(counted, vote == 1, votes),
                "human": rate(counted, vote == pl.col("vote_human"), votes, voted(HUMAN)),
                "winner": rate(counted, vote == side("winner"), votes, DECIDED),
            }
        )
    return pl.DataFrame(rows, schema=PER_METRIC)


PER_METRIC = {
    "metric": pl.String,
    "coverage": pl.Float64,
    "abstains": pl.Float64,
    "votes": pl.Int64,
    "side_0": pl.Float64,
    "human": pl.Float64,
    "winner": pl.Float64,
}
DECIDED = pl.col("winner").is_not_null()
JUDGED = DECIDED & voted(HUMAN) & (pl.col("decided_by") != HUMAN)
"""Pairs with a winner and a human choice that did not make it: only there can the two differ."""


def side(winner: str) -> pl.Expr:
    """A column of winners (0, 1) as votes (+1, -1)."""
    return 1 - 2 * pl.col(winner)


# --- all together --------------------------------------------------------------------------------


def fleiss_kappa(counted: pl.DataFrame) -> float | None:
    """Agreement beyond chance of all metrics (Fleiss 1971), abstention being a third answer."""
    votes, pairs = _complete(counted)
    num_voters = votes.shape[1]
    if not pairs.sum() or num_voters < 2:
        return None
    answers = np.stack([(votes == answer).sum(axis=1) for answer in (-1, 0, 1)], axis=1)
    agreement = ((answers**2).sum(axis=1) - num_voters) / (num_voters * (num_voters - 1))
    observed = float(agreement @ pairs / pairs.sum())
    chance = float(((pairs @ answers / (pairs.sum() * num_voters)) ** 2).sum())
    return None if chance == 1 else (observed - chance) / (1 - chance)


def krippendorff_alpha(counted: pl.DataFrame) -> float | None:
    """Agreement beyond chance of all metrics (Krippendorff 2011, nominal data).

    An abstention or a missing score is no answer; pairs with fewer than two votes do not count.
    """
    votes, pairs = _votes(counted).to_numpy(), counted["pairs"].to_numpy()
    first, second = ((np.nan_to_num(votes) == sign).sum(axis=1) for sign in (1, -1))
    answers = first + second
    paired = answers > 1
    first, second, answers, pairs = first[paired], second[paired], answers[paired], pairs[paired]
    chance = float(first @ pairs) * float(second @ pairs)
    if not chance:
        return None
    disagreement = float((first * second / (answers - 1)) @ pairs)
    return 1 - (float(answers @ pairs) - 1) * disagreement / chance


def effective_voters(counted: pl.DataFrame) -> float | None:
    """How many independent voters the metrics are worth: (sum of eigenvalues)^2 / sum of squares.

    Eigenvalues of the votes' correlation matrix; equal voters count as one.
    """
    votes, pairs = _complete(counted)
    if pairs.sum() < 2:
        return None
    covariance = np.cov(votes.T, fweights=pairs).reshape(votes.shape[1], -1)
    deviation = np.sqrt(np.diag(covariance))
    if not deviation.all():
        return None
    eigenvalues = np.linalg.eigvalsh(covariance / np.outer(deviation, deviation))
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def _votes(counted: pl.DataFrame) -> pl.DataFrame:
    return counted.select(pl.col(f"vote_{m}").cast(pl.Float64) for m in metrics_of(counted))


def _complete(counted: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Votes (combination, metric) that lack none, and the number of pairs of each combination."""
    scored = counted.drop_nulls([f"vote_{m}" for m in metrics_of(counted)])
    return _votes(scored).to_numpy(), scored["pairs"].to_numpy()
