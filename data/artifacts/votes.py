"""Agreement of voters, for the label report and the evaluation report alike."""

import numpy as np


def equal_votes(votes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Fraction of equal votes of each two voters, where neither abstains; NaN without such pairs.

    Args:
        votes: (combination, voter) +1, -1, or 0 for no vote.
        pairs: (combination,) How many pairs have each combination of votes.

    Returns:
        A symmetric (voter, voter) matrix with ones on the diagonal.
    """
    votes, pairs = votes.astype(np.int64), pairs.astype(np.int64)
    compared = np.abs(votes).T @ (np.abs(votes) * pairs[:, None])
    equal_minus_opposite = votes.T @ (votes * pairs[:, None])
    with np.errstate(invalid="ignore"):
        fractions = (compared + equal_minus_opposite) / (2 * compared)
    np.fill_diagonal(fractions, 1.0)
    return np.asarray(fractions)
