import numpy as np
import polars as pl
import pytest

from data.artifacts.votes import equal_votes
from label.analysis import agreement
from label.config import Rule, TieRule, VoteSpec
from label.voting.rules import VotingRule, label_pairs
from tests.test_vote import scored, votes

# a and b always agree, c is their opposite on the first two pairs and abstains on the last
VOTES = votes((1, 1, -1), (-1, -1, 1), (1, 1, 1), (-1, -1, -1), (1, 1, 0))
HUMAN = [1.0, 1.0, 0.0, 0.0, 0.5]


def counted(
    scores: np.ndarray, human: list[float | None] | None = None, names: str = "abc"
) -> pl.DataFrame:
    voters = tuple(names[: scores.shape[1]])
    return agreement.ballots(
        label_pairs(scored(scores, human, voters), VotingRule(VoteSpec(), voters))
    )


@pytest.fixture
def five() -> pl.DataFrame:
    return counted(VOTES, HUMAN)


def test_ballots_hold_every_pair_once(five: pl.DataFrame) -> None:
    assert five["pairs"].sum() == 5
    assert agreement.metrics_of(five) == ["a", "b", "c"]
    again = counted(np.concatenate([VOTES, VOTES]), HUMAN + HUMAN)
    assert again.height == five.height
    assert again["pairs"].to_list() == [2] * 5


def test_equal_votes_by_hand() -> None:
    votes = np.array([(1, 1, -1), (1, 1, 0), (-1, -1, 1), (1, -1, 0)])
    matrix = equal_votes(votes, np.array([3, 2, 1, 2]))
    assert matrix[0, 1] == 6 / 8
    assert matrix[0, 2] == 0  # compared on four pairs
    assert np.array_equal(matrix, matrix.T)
    assert np.diag(matrix).tolist() == [1, 1, 1]
    assert np.isnan(equal_votes(np.array([(1, 0)]), np.array([9]))[0, 1])


def test_agreement_matrix_ends_with_the_human(five: pl.DataFrame) -> None:
    matrix = agreement.agreement_matrix(five)
    assert matrix.rows() == [
        ("a", None, 1.0, 0.5, 0.5),
        ("b", 1.0, None, 0.5, 0.5),
        ("c", 0.5, 0.5, None, 0.5),
        ("human", 0.5, 0.5, 0.5, None),
    ]
    assert matrix.columns == ["voter", "a", "b", "c", "human"]
    assert agreement.agreement_matrix(counted(VOTES)).columns == ["voter", "a", "b", "c"]


def test_each_voter_by_hand(five: pl.DataFrame) -> None:
    a, _, c, human, label = agreement.voters(five).to_dicts()
    assert a == {
        "voter": "a", "coverage": 1.0, "abstains": 0.0, "side_0": 0.6, "human": 0.5, "label": 1.0,
    }  # fmt: skip
    assert c["abstains"] == 0.2
    assert c["side_0"] == 0.5  # of four votes
    assert c["human"] == 0.5  # of the four pairs with a choice: wrong, right, wrong, right
    assert c["label"] == 0.5
    assert (human["voter"], human["coverage"], human["abstains"]) == ("human", 1.0, 0.2)
    assert (human["human"], human["label"], human["side_0"]) == (None, 0.5, 0.5)
    assert (label["voter"], label["coverage"], label["side_0"]) == ("label", 1.0, 0.6)
    assert (label["human"], label["label"]) == (0.5, None)


def test_labels_that_people_decided_do_not_count_as_agreement() -> None:
    spec = VoteSpec(rule=Rule.majority, tie_rule=TieRule.human)
    scores = scored(votes((1, -1), (1, 1)), [1.0, 0.0], ("a", "b"))
    frame = agreement.ballots(label_pairs(scores, VotingRule(spec, ("a", "b"))))
    a, _, human, label = agreement.voters(frame).to_dicts()
    assert label["coverage"] == 1.0
    assert label["human"] == human["label"] == 0.0  # the second pair alone
    assert a["label"] == 1.0


def test_krippendorff_alpha_equals_its_textbook_example() -> None:
    # Krippendorff 2011, section A: two observers, ten units, binary: alpha 0.095
    first, second = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    rows = [(2 * a - 1, 2 * b - 1) for a, b in zip(first, second, strict=True)]
    assert agreement.krippendorff_alpha(counted(votes(*rows))) == pytest.approx(0.095, abs=5e-4)


def test_krippendorff_alpha_leaves_out_what_nobody_compares() -> None:
    rows = [(1, 1, 0), (-1, -1, 1), (1, 0, 1)]
    alone = [*rows, (1, 0, 0), (0, 0, -1), (0, 0, 0)]
    expected = agreement.krippendorff_alpha(counted(votes(*rows)))
    assert agreement.krippendorff_alpha(counted(votes(*alone))) == expected
    # by hand: 7 answers, 5 and 2; one of the units has 1 x 2 unequal pairs over 3 - 1
    assert expected == pytest.approx(1 - 6 * 1 / (5 * 2))
    assert agreement.krippendorff_alpha(counted(votes((1, 1), (1, 1)))) is None


def test_nothing_to_compare_is_none() -> None:
    frame = counted(votes((0, 0)))
    assert agreement.krippendorff_alpha(frame) is None
    assert agreement.voters(frame)["side_0"].to_list() == [None, None, None]
    assert agreement.agreement_matrix(frame).rows() == [("a", None, None), ("b", None, None)]
