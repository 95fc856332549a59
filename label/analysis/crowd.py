"""What the votes would say if voters were weighed by how reliable they look (Dawid and Skene 1979).

For comparison only, never a label: the model takes voters to err independently, and scorers that
share a backbone agree with each other for other reasons than being right. Ours is the textbook's EM
on counted combinations of votes, a few hundred rows whatever the set's size; crowd-kit's gives the
same numbers (tests), takes one row per vote, and brings ten packages.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from label.analysis.agreement import DECIDED, JUDGED, num_pairs, rate, side, voted
from label.config import HUMAN

ITERATIONS = 500
TOLERANCE = 1e-8
"""EM stops when no combination's probability moves by more."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What EM found."""

    image_0: np.ndarray
    """(combination) Probability that image 0 is the better one."""
    reliability: np.ndarray
    """(voter) Probability that a vote is right, over both images."""


def dawid_skene(votes: np.ndarray, pairs: np.ndarray) -> Crowd:
    """EM over counted combinations of votes (combination, voter); 0 is no vote.

    Begins at the share of votes, as the authors do. Every row must have a vote.
    """
    answers = np.stack([votes == 1, votes == -1], axis=-1).astype(np.float64)
    first = answers[..., 0].sum(axis=1) / answers.sum(axis=(1, 2))
    truth = np.stack([first, 1 - first], axis=1)
    for _ in range(ITERATIONS):
        weighted = truth * pairs[:, None]
        prior = weighted.sum(axis=0) / pairs.sum()
        confusion = np.einsum("pt,pva->vta", weighted, answers)  # (voter, truth, answer)
        total = confusion.sum(axis=-1, keepdims=True)
        confusion = np.divide(confusion, total, out=np.full_like(confusion, 0.5), where=total > 0)
        with np.errstate(divide="ignore"):
            logs = np.log(np.maximum(confusion, np.finfo(np.float64).tiny))
            joint = np.log(prior) + np.einsum("pva,vta->pt", answers, logs)
        likelihood = np.exp(joint - joint.max(axis=1, keepdims=True))
        before, truth = truth, likelihood / likelihood.sum(axis=1, keepdims=True)
        if np.abs(truth - before).max() < TOLERANCE:
            break
    right = (confusion[:, 0, 0] * prior[0]) + (confusion[:, 1, 1] * prior[1])
    return Crowd(truth[:, 0], right)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dawid-Skene's winners beside the labels."""

    reliability: dict[str, float]
    """Metric -> how often its votes are right, if the model holds."""
    pairs: int
    """Pairs with a vote, which are all that it can decide."""
    agreement: float | None
    """Share of decided pairs on which both name the same winner."""
    human_label: float | None
    """Agreement of the labels with the human choice, where label, model and people chose, each by
    itself."""
    human_crowd: float | None
    """Agreement of the model with the human choice on the same pairs."""
    undecided: int
    """Pairs that the model decides and the vote does not."""
    human_undecided: float | None
    """Agreement of the model with the human choice on these; 0.5 is a coin's."""


def compare(counted: pl.DataFrame, voters: tuple[str, ...]) -> Comparison | None:
    """Dawid-Skene over the voters' votes, beside the labels; None where nobody voted."""
    names = [f"vote_{voter}" for voter in voters]
    cast = counted.filter(pl.col("status") == "ok", pl.any_horizontal(map(voted, voters)))
    if cast.is_empty():
        return None
    found = dawid_skene(cast.select(names).fill_null(0).to_numpy(), cast["pairs"].to_numpy())
    sign = np.sign(np.round(found.image_0 - 0.5, 9)).astype(np.int8)
    cast = cast.with_columns(crowd=pl.Series(sign))
    crowd, chose = pl.col("crowd"), pl.col("crowd") != 0
    right = crowd == pl.col("vote_human")
    return Comparison(
        reliability=dict(zip(voters, found.reliability.tolist(), strict=True)),
        pairs=num_pairs(cast),
        agreement=rate(cast, crowd == side("winner"), DECIDED, chose),
        human_label=rate(cast, side("winner") == pl.col("vote_human"), JUDGED, chose),
        human_crowd=rate(cast, right, JUDGED, chose),
        undecided=num_pairs(cast, ~DECIDED, chose),
        human_undecided=rate(cast, right, ~DECIDED, chose, voted(HUMAN)),
    )
