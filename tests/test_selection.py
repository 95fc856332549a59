"""`vote.select=extremes` on tournaments made by hand, and against the definition."""

from collections import defaultdict
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from label.analysis.console import outcome_line, rule_words
from label.analysis.statistics import compute_statistics
from label.config import Rule, Select, TieRule, VoteSpec
from label.voting.label_set import label_settings, outcomes
from label.voting.rules import VotingRule, label_pairs
from label.voting.selection import NOT_EXTREME
from tests.test_vote import METRICS, scored, votes

WINS, TIES, LOSES = (1, 1, 1, -1), (1, 1, -1, -1), (-1, -1, -1, 1)
CLEARLY = (1, 1, 1, 1)


def tournament(
    *matches: tuple[str, tuple[int, ...]],
    prompts: list[str] | None = None,
    human: list[float | None] | None = None,
    **spec: object,
) -> pl.DataFrame:
    """The labels of pairs `AB` (image 0, image 1) with the voters' votes."""
    frame = scored(votes(*(cast for _, cast in matches)), human).with_columns(
        image_0=pl.Series([pair[0] for pair, _ in matches]),
        image_1=pl.Series([pair[1] for pair, _ in matches]),
        prompt=pl.Series(prompts or ["a prompt"] * len(matches)),
    )
    voting_rule = VotingRule(VoteSpec(select=Select.extremes, **spec), METRICS)
    return label_pairs(frame, voting_rule)


def winners(labelled: pl.DataFrame) -> list[str]:
    """`AB` for each pair that kept a winner, the winner first."""
    return [
        one + other if winner == 0 else other + one
        for one, other, winner in labelled.select("image_0", "image_1", "winner").iter_rows()
        if winner is not None
    ]


def test_only_best_against_worst_keeps_its_winner():
    labelled = tournament(
        ("AB", WINS), ("AC", WINS), ("AD", WINS), ("CB", LOSES), ("BD", WINS), ("DC", LOSES)
    )  # A beats all, B beats C and D, C beats D
    assert winners(labelled) == ["AD"]
    assert labelled["decided_by"].to_list() == [
        NOT_EXTREME, NOT_EXTREME, "majority", NOT_EXTREME, NOT_EXTREME, NOT_EXTREME
    ]  # fmt: skip
    assert labelled["status"].to_list() == ["ok"] * 6
    assert labelled["margin"].to_list() == [2] * 6
    assert outcomes(labelled) == {NOT_EXTREME: 5, "majority": 1}
    assert outcome_line(labelled) == "decided 1 (majority 1) · not extreme 5 · total 6"


def test_a_tied_match_is_half_a_win_for_both():
    # counts: A 1.5, B 1, C 0.5; by wins alone A and B would be equal
    labelled = tournament(("AB", TIES), ("AC", WINS), ("BC", TIES))
    assert winners(labelled) == ["AC"]
    assert labelled["decided_by"].to_list() == ["tie", "majority", "tie"]


def test_a_cycle_has_no_extremes():
    cycle = [("AB", WINS), ("BC", WINS), ("CA", WINS)]
    assert winners(tournament(*cycle)) == []
    by_people = {"human": [1.0, 0.0, None], "tie_rule": TieRule.human}
    assert winners(tournament(*cycle, **by_people)) == ["AB"]
    by_metric = {"tie_rule": TieRule.metric, "tie_metric": "d"}
    beside = [*cycle[:2], ("CA", CLEARLY)]  # d votes for the losers of the other two
    assert winners(tournament(*beside, **by_metric)) == ["CA"]


def test_a_cycle_above_a_common_loser_gives_one_pair_with_that_loser():
    cycle = [("AB", WINS), ("BC", WINS), ("CA", WINS), ("AD", WINS), ("BD", CLEARLY), ("CD", WINS)]
    assert winners(tournament(*cycle)) == ["BD"]  # equal counts: the largest lead in votes


def test_a_worst_image_that_beat_the_best_is_no_winner():
    # A beats B, C, D; E beats A alone; counts A 3, B C D 2, E 1
    labelled = tournament(
        ("AB", WINS), ("AC", WINS), ("AD", WINS), ("EA", WINS), ("BC", WINS), ("CD", WINS),
        ("DB", WINS), ("BE", WINS), ("CE", WINS), ("DE", WINS),
    )  # fmt: skip
    assert winners(labelled) == ["AB"]  # of the differences of 1, by the order of names


def test_of_a_chain_the_pair_that_exists_with_the_largest_difference():
    # Pick-a-Pic's chain: the winner stays, the loser is replaced. Counts: B 2, D 1, A C 0
    labelled = tournament(("AB", LOSES), ("BC", CLEARLY), ("BD", LOSES))
    assert winners(labelled) == ["BC"]  # BA is as far apart, with fewer votes


@pytest.mark.parametrize(("tie_rule", "pair"), [(TieRule.drop, "AB"), (TieRule.human, "AC")])
def test_equal_counts_are_decided_by_the_tie_rule_first(tie_rule: TieRule, pair: str):
    labelled = tournament(
        ("AB", CLEARLY), ("AC", WINS), ("BC", TIES), human=[0.0, 1.0, None], tie_rule=tie_rule
    )
    assert winners(labelled) == [pair]


def test_prompts_do_not_mix_and_a_single_pair_stays_as_it_is():
    labelled = tournament(
        ("AB", WINS), ("AB", TIES), ("AB", WINS), ("BC", WINS), ("AC", WINS),
        prompts=["one", "tied", "three", "three", "three"],
    )  # fmt: skip
    assert labelled["winner"].to_list() == [0, None, None, None, 0]
    assert labelled["decided_by"].to_list()[:2] == ["majority", "tie"]


def test_bad_rows_images_without_names_and_an_image_against_itself():
    frame = scored(votes(WINS, WINS, WINS, WINS)).with_columns(
        image_0=pl.Series(["A", "B", None, "C"]),
        image_1=pl.Series(["B", "C", None, "C"]),
        status=pl.Series(["ok", "ok", "ok", "unreadable_image"]),
        reason=pl.Series(["", "", "", "image 1: torn"]),
    )
    spec = VoteSpec(rule=Rule.random, select=Select.extremes)
    frame = pl.concat([frame, frame.tail(1).with_columns(status=pl.lit("ok"))])
    labelled = label_pairs(frame, VotingRule(spec, METRICS))
    assert labelled["decided_by"][3] == "unreadable_image"
    assert labelled["decided_by"][4] == NOT_EXTREME  # an image cannot beat itself
    assert labelled["winner"].null_count() == 4


@settings(max_examples=40, deadline=None)
@given(
    outcomes_=st.lists(st.sampled_from([1, 0, -1]), min_size=10, max_size=10),
    kept=st.lists(st.booleans(), min_size=10, max_size=10),
    order=st.permutations(range(10)),
)
def test_the_definition(outcomes_: list[int], kept: list[bool], order: list[int]):
    """Against the definition, whatever the order of rows and the sides of the images."""
    cast = {1: WINS, 0: TIES, -1: LOSES}
    pairs = ["".join(pair) for pair in combinations("ABCDE", 2)]
    matches = [(pairs[i], outcomes_[i]) for i in order if kept[i]]
    if not matches:
        return
    labelled = tournament(*[(pair, cast[outcome]) for pair, outcome in matches])
    count: defaultdict[str, float] = defaultdict(float)
    for (one, other), outcome in matches:
        count[one] += (1 + outcome) / 2
        count[other] += (1 - outcome) / 2
    gaps = {
        (pair if outcome == 1 else pair[::-1]): outcome * (count[pair[0]] - count[pair[1]])
        for pair, outcome in matches
        if outcome
    }
    best = max([0.0, *gaps.values()])
    candidates = sorted(pair for pair, gap in gaps.items() if gap == best > 0)
    assert winners(labelled) == sorted(candidates, key=sorted)[:1]
    turned = tournament(*[(pair[::-1], cast[-outcome]) for pair, outcome in matches])
    assert winners(turned) == winners(labelled)


def test_a_set_of_all_pairs_is_the_set_of_before():
    rule, metrics = VotingRule(VoteSpec(), ("a",)), {"a": {}}
    vote = {"name": "x", "rule": "majority", "weights": {}}
    before = label_settings(rule, vote, metrics, ())
    assert label_settings(rule, vote | {"select": "all"}, metrics, ()) == before
    other = label_settings(rule, vote | {"select": "extremes"}, metrics, ())
    assert other["vote"] == {"rule": "majority", "select": "extremes"}


def test_inspection_says_what_was_selected_and_calls_no_selection_a_tie():
    labelled = tournament(("AB", WINS), ("AC", WINS), ("BC", TIES))
    rule = VotingRule(VoteSpec(select=Select.extremes), METRICS)
    assert "Of each prompt's pairs only the one" in rule_words(rule)
    assert "keeps its winner" not in rule_words(VotingRule(VoteSpec(), METRICS))
    ties = compute_statistics(labelled, rule).tables["ties"].frame
    assert ties.select("outcome", "pairs").rows() == [("tie", 1)]


def test_a_large_set_is_selected_in_moments():
    rng = np.random.default_rng(0)
    n = 20_000
    frame = scored(rng.normal(size=(n, 4, 2))).with_columns(
        prompt=pl.Series([f"prompt {i // 6}" for i in range(n)]),
        image_0=pl.Series([f"{i // 6}/{'AAABBC'[i % 6]}" for i in range(n)]),
        image_1=pl.Series([f"{i // 6}/{'BCDCDD'[i % 6]}" for i in range(n)]),
    )
    labelled = label_pairs(frame, VotingRule(VoteSpec(select=Select.extremes), METRICS))
    per_prompt = labelled.group_by("prompt").agg(pl.col("winner").count())["winner"]
    assert per_prompt.max() == 1
    assert per_prompt.mean() > 0.9
