import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.artifacts.schemas import Status, labels
from label.config import Rule, TieRule, VoteSpec
from label.voting.label_set import check_decided, outcomes
from label.voting.rules import VotingRule, coins, label_pairs

METRICS = ("a", "b", "c", "d")


def scored(
    scores: np.ndarray,
    human: list[float | None] | None = None,
    metrics: tuple[str, ...] = METRICS,
    keys: list[str] | None = None,
) -> pl.DataFrame:
    """Score columns (pair, metric, image) as the scoring pass leaves them, every row ok."""
    n = len(scores)
    columns = {
        "pair_id": [f"{key}-0" for key in keys or [f"{i:032x}" for i in range(n)]],
        "prompt": ["a prompt"] * n,
        "source": ["file"] * n,
        "row": list(range(n)),
        "image_0": ["l"] * n,
        "image_1": ["r"] * n,
        "human": human or [None] * n,
        "status": ["ok"] * n,
        "reason": [""] * n,
    }
    columns |= {f"{side}_{i}": [8] * n for side in ("width", "height") for i in (0, 1)}
    for m, metric in enumerate(metrics):
        for image in (0, 1):
            columns[f"score_{metric}_{image}"] = scores[:, m, image]
            columns[f"status_{metric}_{image}"] = ["ok"] * n
    return pl.DataFrame(columns).with_columns(
        pl.col("human").cast(pl.Float32), pl.col(r"^score_.*$").cast(pl.Float32)
    )


def votes(*rows: tuple[int, ...]) -> np.ndarray:
    """Scores that make these votes."""
    gap = np.array(rows, float)
    return np.stack([0.5 + gap, 0.5 - gap], axis=-1)


def decide(
    scores: np.ndarray, human: list[float | None] | None = None, seed: int = 0, **spec: object
) -> pl.DataFrame:
    voting_rule = VotingRule(VoteSpec(**spec), METRICS, seed=seed)
    return label_pairs(scored(scores, human), voting_rule)


SPLIT = votes(
    (1, 1, 1, 1), (1, 1, 1, -1), (1, 1, -1, -1), (-1, -1, -1, 1), (1, 0, 0, 0), (0, 0, 0, 0)
)


@pytest.mark.parametrize(
    ("spec", "winner", "decided_by"),
    [
        ({"rule": Rule.majority}, [0, 0, None, 1, 0, None],
         ["majority", "majority", "tie", "majority", "majority", "tie"]),
        ({"rule": Rule.unanimous}, [0, None, None, None, 0, None],
         ["unanimous", "not_unanimous", "tie", "not_unanimous", "unanimous", "tie"]),
        ({"rule": Rule.at_least, "votes": 3}, [0, 0, None, 1, None, None],
         ["at_least", "at_least", "tie", "at_least", "too_few_votes", "tie"]),
        ({"rule": Rule.single, "metric": "d"}, [0, 1, 1, 0, None, None],
         ["single", "single", "single", "single", "tie", "tie"]),
        ({"rule": Rule.majority, "tie_rule": TieRule.metric, "tie_metric": "c"},
         [0, 0, 1, 1, 0, None],
         ["majority", "majority", "metric:c", "majority", "majority", "tie"]),
    ],
)  # fmt: skip
def test_each_rule_on_six_ballots(
    spec: dict, winner: list[int | None], decided_by: list[str]
) -> None:
    result = decide(SPLIT, **spec)
    assert result["winner"].to_list() == winner
    assert result["decided_by"].to_list() == decided_by
    assert result["votes_0"].to_list() == [4, 3, 2, 1, 1, 0]
    assert result["votes_1"].to_list() == [0, 1, 2, 3, 0, 0]


def test_columns_and_types_are_those_of_label_shards() -> None:
    result = decide(SPLIT)
    assert result.to_arrow().cast(labels(METRICS)).schema.equals(labels(METRICS))


def test_human_rule_and_human_tie_rule() -> None:
    human = [0.0, 1.0, 0.0, 0.5, None, None]
    result = decide(SPLIT, human, rule=Rule.human)
    assert result["winner"].to_list() == [1, 0, 1, None, None, None]
    assert result["decided_by"].to_list() == [
        "human", "human", "human", "tie", "no_human_label", "no_human_label"
    ]  # fmt: skip
    assert result["margin"].to_list() == [-4, 2, 0, 2, 1, 0]  # below 0: the votes were overruled
    broken = decide(SPLIT, human, rule=Rule.majority, tie_rule=TieRule.human)
    assert broken["winner"].to_list() == [0, 0, 1, 1, 0, None]
    assert broken["decided_by"][2] == "human"


def test_human_as_one_more_voter_breaks_even_splits() -> None:
    result = decide(SPLIT, [0.0, 1.0, 1.0, 0.5, 0.0, None], human_votes=True)
    assert result["votes_0"].to_list() == [4, 4, 3, 1, 1, 0]
    assert result["votes_1"].to_list() == [1, 1, 2, 3, 1, 0]
    assert result["winner"].to_list() == [0, 0, 0, 1, None, None]


def test_gap_up_to_the_threshold_abstains() -> None:
    scores = np.array([[[1.0, 0.75]] * 4, [[1.0, 0.5]] * 4])
    voting_rule = VotingRule(VoteSpec(), METRICS, {"a": 0.25, "b": 0.5})
    result = label_pairs(scored(scores), voting_rule)
    assert result["vote_a"].to_list() == [0, 1]
    assert result["vote_b"].to_list() == [0, 0]
    assert result["vote_c"].to_list() == [1, 1]


def test_sum_lets_the_largest_scale_decide_and_zscore_sum_does_not() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 4, 2))
    scores[:, 0] *= 1000
    raw = decide(scores, rule=Rule.sum)
    expected = np.where(scores.sum(1)[:, 0] > scores.sum(1)[:, 1], 0, 1)
    assert raw["winner"].to_list() == expected.tolist()
    standardised = (scores - scores.mean((0, 2), keepdims=True)) / scores.std((0, 2), keepdims=True)
    normal = decide(scores, rule=Rule.zscore_sum)
    expected = np.where(standardised.sum(1)[:, 0] > standardised.sum(1)[:, 1], 0, 1)
    assert normal["winner"].to_list() == expected.tolist()
    assert (raw["winner"] != normal["winner"]).any()


def test_constant_metric_has_no_say_in_zscore_sum() -> None:
    scores = votes((1, 1, 1, 1), (-1, -1, -1, -1))
    scores[:, 0] = 7.0
    assert decide(scores, rule=Rule.zscore_sum)["winner"].to_list() == [0, 1]


def test_coins_are_fair_differ_by_seed_and_by_occurrence_and_know_no_order() -> None:
    rng = np.random.default_rng(1)
    ids = pl.Series([f"{rng.bytes(16).hex()}-{i % 3}" for i in range(20_000)])
    first, second = coins(ids, 0), coins(ids, 1)
    assert abs(first.mean()) < 0.03
    assert abs((first * second).mean()) < 0.03
    assert coins(ids.reverse(), 0).reverse().equals(first)
    same_pair = pl.Series([f"{'ab' * 16}-{i}" for i in range(2000)])
    assert abs(coins(same_pair, 0).mean()) < 0.1
    assert coins(pl.Series([f"{'0' * 32}-0", f"{'f' * 32}-1"]), -5).is_in([-1, 1]).all()


def test_equal_pairs_get_occurrence_numbers_over_the_whole_set() -> None:
    keys = ["a" * 32, "b" * 32, "a" * 32, "a" * 32, "b" * 32, "c" * 32]
    result = label_pairs(scored(SPLIT, keys=keys), VotingRule(VoteSpec(), METRICS))
    assert [name[0] + name[32:] for name in result["pair_id"]] == [
        "a-0", "b-0", "a-1", "a-2", "b-1", "c-0"
    ]  # fmt: skip


def test_bad_rows_keep_their_place_and_never_win() -> None:
    frame = scored(votes(*[(1, 1, 1, 1)] * 4), human=[1.0] * 4).with_columns(
        status=pl.Series(["ok", "unreadable_image", "empty_prompt", "ok"]),
        reason=pl.Series(["", "image 0: torn", "the prompt is empty", ""]),
        score_b_1=pl.Series([0.0, None, None, None], dtype=pl.Float32),
        status_b_1=pl.Series(["ok", "unreadable_image", "empty_prompt", Status.NOT_FINITE.value]),
    )
    for rule in Rule:
        needed = {Rule.single: {"metric": "a"}, Rule.at_least: {"votes": 1}}.get(rule, {})
        spec = VoteSpec(rule=rule, tie_rule=TieRule.human, **needed)
        result = label_pairs(frame, VotingRule(spec, METRICS))
        assert result["winner"].to_list()[1:] == [None, None, None]
        assert result["decided_by"].to_list()[1:] == [
            "unreadable_image", "empty_prompt", "not_finite_score"
        ]  # fmt: skip
        assert result["reason"][3] == "not finite; b: score of image 1"
        assert result["vote_b"].to_list() == [1, None, None, None]
        assert sum(outcomes(result).values()) == 4


def test_nothing_decidable_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 pairs can be decided \(2 tie\)"):
        check_decided(decide(votes((1, 1, -1, -1), (0, 0, 0, 0))))


def test_impossible_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="can never be reached by 4 voters"):
        VotingRule(VoteSpec(rule=Rule.at_least, votes=5), METRICS)
    with pytest.raises(ValueError, match=r"needs vote\.metric"):
        VoteSpec(rule=Rule.single)
    with pytest.raises(ValueError, match=r"vote\.name='\.\.'"):
        VoteSpec(name="..")
    with pytest.raises(ValueError, match=r"needs vote\.tie_metric"):
        VoteSpec(tie_rule=TieRule.metric)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"votes": 3}, r"vote\.votes=3 has no meaning for vote\.rule=majority.*at_least"),
        ({"rule": Rule.sum, "metric": "a"}, r"vote\.metric=a has no meaning.*read by single"),
        ({"tie_metric": "a"}, r"for vote\.tie_rule=drop; it is read by metric"),
        ({"rule": Rule.random, "human_votes": True}, "majority, unanimous, at_least"),
        ({"rule": Rule.unanimous, "weights": {"a": 2.0}}, "majority, at_least, sum, zscore_sum"),
        ({"rule": Rule.single, "metric": "a", "weights": {"a": 2.0}}, "for vote.rule=single"),
        ({"weights": {"a": 1.5}}, r"vote\.weights\.a=1\.5; a weight is a whole number.*3 and 2"),
        ({"weights": {"a": 0.0}}, r"vote\.weights\.a=0; .*left out of panel\.voters"),
        ({"weights": {"a": float("nan")}}, "weights.a=nan"),
        ({"weights": {"a": float("inf")}}, "weights.a=inf"),
        ({"weights": {"human": 2.0}}, r"needs vote\.human_votes=true"),
    ],
    ids=str,
)
def test_settings_that_the_rule_never_reads_are_refused(spec: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VoteSpec(**spec)


def test_a_weight_is_a_number_of_votes() -> None:
    result = decide(SPLIT, weights={"d": 2.0})  # d: + - - + 0 0
    assert result["votes_0"].to_list() == [5, 3, 2, 2, 1, 0]
    assert result["votes_1"].to_list() == [0, 2, 3, 3, 0, 0]
    assert result["winner"].to_list() == [0, 0, 1, 1, 0, None]
    assert result["margin"].to_list() == [5, 1, 1, 1, 1, 0]
    heavy = decide(SPLIT, weights={"d": 4.0})
    assert heavy["winner"].to_list() == [0, 1, 1, 0, 0, None]
    enough = decide(SPLIT, rule=Rule.at_least, votes=3, weights={"d": 2.0})
    assert enough["winner"].to_list() == [0, 0, 1, 1, None, None]
    as_tie_metric = decide(SPLIT, tie_rule=TieRule.metric, tie_metric="d")
    assert result["winner"].equals(as_tie_metric["winner"])  # two votes in four break every tie


def test_the_human_label_may_weigh_too() -> None:
    human = [0.0, 0.0, 0.0, 0.5, None, 1.0]
    result = decide(SPLIT, human, human_votes=True, weights={"human": 3.0})
    assert result["votes_1"].to_list() == [3, 4, 5, 3, 0, 0]
    assert result["winner"].to_list() == [0, 1, 1, 1, 0, 0]


def test_weights_are_factors_of_gaps_where_scores_are_summed() -> None:
    scores = np.random.default_rng(3).normal(size=(100, 4, 2))
    result = decide(scores, rule=Rule.sum, weights={"a": 3.0, "c": 2.0})
    gaps = (scores[:, :, 0] - scores[:, :, 1]) @ [3, 1, 2, 1]
    assert result["winner"].to_list() == np.where(gaps > 0, 0, 1).tolist()


def test_weights_name_voters_and_fit_their_columns() -> None:
    with pytest.raises(ValueError, match=r"vote\.weights names e, which has no vote; voters: a, b"):
        VotingRule(VoteSpec(weights={"e": 2.0}), METRICS)
    with pytest.raises(ValueError, match="the voters have 128 votes together, more than 127"):
        VotingRule(VoteSpec(weights={"a": 125.0}), METRICS)
    with pytest.raises(ValueError, match="can never be reached by 4 voters with 6 votes"):
        VotingRule(VoteSpec(rule=Rule.at_least, votes=7, weights={"a": 3.0}), METRICS)
    most = decide(votes((1, 1, 1, 1), (-1, 1, 1, 1)), weights={"a": 124.0})
    assert most["votes_0"].to_list() == [127, 3]
    assert most["margin"].to_list() == [127, 121]


# --- what must hold for any scores ---------------------------------------------------------------

score_arrays = st.lists(
    st.lists(st.tuples(*[st.integers(-40, 40)] * 2), min_size=4, max_size=4),
    min_size=1,
    max_size=12,
).map(lambda rows: np.array(rows, float) / 8)
vote_rules = st.sampled_from(
    [
        VoteSpec(),
        VoteSpec(rule=Rule.unanimous),
        VoteSpec(rule=Rule.at_least, votes=3),
        VoteSpec(rule=Rule.single, metric="b"),
        VoteSpec(tie_rule=TieRule.metric, tie_metric="c"),
        VoteSpec(human_votes=True),
        VoteSpec(weights={"a": 3.0, "d": 2.0}),
        VoteSpec(rule=Rule.at_least, votes=3, weights={"b": 2.0}),
    ]
)
TALLY = ["votes_0", "votes_1", "margin", "winner", "decided_by"]


@settings(max_examples=40, deadline=None)
@given(scores=score_arrays, spec=vote_rules, power=st.sampled_from([1, 3]), shift=st.floats(-9, 9))
def test_increasing_rescaling_of_a_metric_changes_no_vote(
    scores: np.ndarray, spec: VoteSpec, power: int, shift: float
) -> None:
    before = label_pairs(scored(scores), VotingRule(spec, METRICS))
    rescaled = scores.copy()
    rescaled[:, 1] = 3 * scores[:, 1] ** power + np.float32(shift).round(2)
    rescaled[:, 2] = np.exp(scores[:, 2])
    after = label_pairs(scored(rescaled), VotingRule(spec, METRICS))
    columns = [*TALLY, *(f"vote_{m}" for m in METRICS)]
    assert after.select(columns).equals(before.select(columns))


@settings(max_examples=40, deadline=None)
@given(scores=score_arrays, spec=vote_rules, order=st.permutations(range(4)))
def test_order_of_metrics_changes_no_vote(
    scores: np.ndarray, spec: VoteSpec, order: list[int]
) -> None:
    before = label_pairs(scored(scores), VotingRule(spec, METRICS))
    names = tuple(METRICS[i] for i in order)
    frame = scored(scores[:, order], metrics=names)
    assert label_pairs(frame, VotingRule(spec, names)).select(TALLY).equals(before.select(TALLY))


@settings(max_examples=40, deadline=None)
@given(
    scores=score_arrays,
    spec=st.one_of(
        vote_rules,
        st.sampled_from(
            [
                VoteSpec(rule=Rule.sum),
                VoteSpec(rule=Rule.zscore_sum),
                VoteSpec(rule=Rule.zscore_sum, weights={"c": 5.0}),
            ]
        ),
    ),
    human=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_swapping_the_images_negates(
    scores: np.ndarray, spec: VoteSpec, human: float | None
) -> None:
    choices = [human] * len(scores)
    swapped = [None if human is None else 1 - human] * len(scores)
    one = label_pairs(scored(scores, choices), VotingRule(spec, METRICS))
    other = label_pairs(scored(scores[:, :, ::-1], swapped), VotingRule(spec, METRICS))
    for metric in METRICS:
        assert (one[f"vote_{metric}"] == -other[f"vote_{metric}"]).all()
    assert one["winner"].equals((1 - other["winner"]).cast(pl.Int8))
    assert one["votes_0"].equals(other["votes_1"].alias("votes_0"))
    assert one.select("margin", "decided_by").equals(other.select("margin", "decided_by"))
