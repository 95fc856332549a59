import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from label.analysis import agreement, crowd
from label.config import VoteSpec
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
def found() -> pl.DataFrame:
    return counted(VOTES, HUMAN)


def test_ballots_hold_every_pair_once(found: pl.DataFrame) -> None:
    assert found["pairs"].sum() == 5
    assert agreement.metrics_of(found) == ["a", "b", "c"]
    again = counted(np.concatenate([VOTES, VOTES]), HUMAN + HUMAN)
    assert again.height == found.height
    assert again["pairs"].to_list() == [2] * 5


def test_pairs_of_metrics_by_hand(found: pl.DataFrame) -> None:
    rows = agreement.pairwise(found, {("a", "b"): 0.25}).to_dicts()
    rows = {(r["metric_a"], r["metric_b"]): r for r in rows}
    assert rows["a", "b"]["agreement"] == 1.0
    assert rows["a", "b"]["kappa"] == 1.0
    assert rows["a", "b"]["spearman"] == 0.25
    assert rows["a", "c"]["pairs"] == 4  # where neither abstains
    assert rows["a", "c"]["agreement"] == 0.5
    assert rows["a", "c"]["kappa"] == 0.0  # both have two votes for each side: chance is 0.5
    assert rows["a", "c"]["spearman"] is None


def test_cohen_kappa_equals_its_textbook_example() -> None:
    # 45 times both yes, 15 only the first, 25 only the second, 15 both no: kappa 0.1304
    table = np.array([[45, 15], [25, 15]])
    assert agreement.cohen_kappa(table) == pytest.approx(0.1304, abs=1e-4)
    assert agreement.cohen_kappa(table * 0) is None
    assert agreement.cohen_kappa(np.array([[45, 0], [0, 0]])) is None


def test_fleiss_kappa_of_two_voters_by_hand() -> None:
    frame = counted(votes((1, 1), (1, 1), (-1, -1), (1, -1)))
    # observed 3/4; answers 5/8 and 3/8, chance 34/64
    assert agreement.fleiss_kappa(frame) == pytest.approx((3 / 4 - 34 / 64) / (1 - 34 / 64))


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


def test_each_metric_by_hand(found: pl.DataFrame) -> None:
    a, _, c = agreement.per_metric(found).to_dicts()
    assert a["coverage"] == 1.0
    assert a["abstains"] == 0.0
    assert c["abstains"] == 0.2
    assert (a["votes"], c["votes"]) == (5, 4)
    assert a["side_0"] == 0.6
    assert c["human"] == 0.5  # of the four pairs with a choice: wrong, right, wrong, right
    assert a["winner"] == 1.0
    assert c["winner"] == 0.5


def test_matrices_are_symmetric_and_end_with_the_human(found: pl.DataFrame) -> None:
    names, shares, kappas = agreement.matrices(found)
    assert names == ["a", "b", "c", "human"]
    assert np.array_equal(shares, shares.T)
    assert np.array_equal(kappas, kappas.T)
    assert shares[0, 3] == 0.5
    assert kappas[0, 1] == 1.0
    assert agreement.matrices(counted(VOTES))[0] == ["a", "b", "c"]


def test_equal_voters_count_as_one() -> None:
    rng = np.random.default_rng(0)
    one = rng.choice([-1, 1], 4000)
    twins = votes(*zip(one, one, strict=True))
    strangers = votes(*zip(one, rng.choice([-1, 1], 4000), strict=True))
    for scores, expected in ((twins, 1.0), (strangers, 2.0)):
        assert agreement.effective_voters(counted(scores)) == pytest.approx(expected, abs=0.01)
    assert agreement.effective_voters(counted(votes((1, 1), (1, -1)))) is None


def test_rank_correlation_of_gaps_equals_scipy() -> None:
    from scipy.stats import spearmanr

    scores = np.random.default_rng(4).normal(size=(300, 3, 2)).round(1)  # with equal gaps
    scores[:, 1] += 0.8 * scores[:, 0]
    names = ("a", "b", "c")
    frame = label_pairs(scored(scores, None, names), VotingRule(VoteSpec(), names))
    ranks = agreement.rank_correlations(frame)
    gaps = (frame["score_a_0"] - frame["score_a_1"], frame["score_b_0"] - frame["score_b_1"])
    assert ranks["a", "b"] == pytest.approx(spearmanr(*gaps).statistic, abs=1e-12)
    assert ranks["a", "b"] > 0.4


def test_nothing_to_compare_is_none() -> None:
    frame = counted(votes((0, 0)))
    assert agreement.fleiss_kappa(frame) is None
    assert agreement.krippendorff_alpha(frame) is None
    assert agreement.per_metric(frame)["side_0"].to_list() == [None, None]
    assert crowd.compare(frame, ("a", "b")) is None


# --- Dawid and Skene -----------------------------------------------------------------------------

PATTERNS = np.array(
    [(1, 1, 1), (1, 1, -1), (1, -1, 1), (-1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1),
     (-1, -1, -1), (1, 0, -1), (0, -1, 1), (0, 0, 1), (-1, -1, 0)]
)  # fmt: skip
PAIRS = np.array([40, 18, 9, 7, 8, 6, 15, 37, 5, 4, 3, 6])
CROWD_KIT = [0.995425, 0.981356, 0.764973, 0.801981, 0.440552, 0.494914, 0.057129, 0.014447,
             0.814955, 0.302235, 0.707811, 0.028612]  # fmt: skip
"""What crowd-kit 1.4.2 gives: DawidSkene(n_iter=500, tol=1e-12), a row per vote that is not 0."""


def test_dawid_skene_equals_crowd_kit() -> None:
    found = crowd.dawid_skene(PATTERNS, PAIRS)
    assert found.image_0 == pytest.approx(CROWD_KIT, abs=2e-6)
    # its confusion matrices' diagonals, weighed by its priors
    assert found.reliability == pytest.approx([0.879616, 0.878018, 0.669632], abs=2e-6)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(3)))
def test_dawid_skene_knows_no_order_and_no_side(order: list[int]) -> None:
    found = crowd.dawid_skene(PATTERNS, PAIRS)
    other = crowd.dawid_skene(-PATTERNS[::-1][:, order], PAIRS[::-1])
    assert 1 - other.image_0[::-1] == pytest.approx(found.image_0, abs=1e-6)
    assert other.reliability == pytest.approx(found.reliability[order], abs=1e-6)


def test_dawid_skene_beside_the_labels_by_hand() -> None:
    # c is right half the time; a and b nearly always agree, so they look reliable
    rows = [(1, 1, 1)] * 20 + [(1, 1, -1)] * 20 + [(-1, -1, 1)] * 20 + [(-1, -1, -1)] * 20
    rows += [(1, -1, 1)] * 2 + [(1, 0, -1)] * 4
    human = [1.0] * 40 + [0.0] * 40 + [1.0] * 2 + [0.0] * 4
    names = ("a", "b", "c")
    labelled = label_pairs(scored(votes(*rows), human, names), VotingRule(VoteSpec(), names))
    found = crowd.compare(agreement.ballots(labelled), names)
    assert found is not None
    assert found.pairs == 86
    assert found.reliability["a"] > 0.95
    assert found.reliability["c"] == pytest.approx(0.5, abs=0.05)
    assert found.human_label == 1.0
    # twice a and c outvote b, whom the model believes, since a abstains and c is a coin
    assert found.agreement == found.human_crowd == pytest.approx(80 / 82)
    assert found.undecided == 4  # a against c: the model believes a
    assert found.human_undecided == 0.0  # and people did not
