import numpy as np
import polars as pl
import pytest

from label.analysis import breakdowns
from label.analysis.agreement import ballots
from label.analysis.statistics import compute_statistics
from label.config import Rule, TieRule, VoteSpec
from label.voting.rules import VotingRule, label_pairs
from tests.test_agreement import HUMAN, VOTES
from tests.test_vote import scored, votes

NAMES = ("a", "b", "c", "d")


def labelled(
    scores: np.ndarray, human: list[float | None] | None = None, **spec: object
) -> tuple[pl.DataFrame, VotingRule]:
    names = NAMES[: scores.shape[1]]
    voting_rule = VotingRule(VoteSpec(**spec), names)
    return label_pairs(scored(scores, human, names), voting_rule), voting_rule


def test_margins_and_flips_add_up() -> None:
    frame, voting_rule = labelled(VOTES, HUMAN)
    margins = breakdowns.margins(ballots(frame))
    assert margins["margin"].to_list() == [1, 2, 3]
    assert margins["pairs"].to_list() == [2, 1, 2]
    assert margins["flips"].to_list() == [0.5, None, 0.5]  # a human tie is no choice
    statistics = compute_statistics(frame, voting_rule)
    assert statistics.human_agreement == 0.5
    assert (statistics.decided, statistics.num_pairs) == (5, 5)


def test_leaving_one_of_an_even_number_out_decides_ties() -> None:
    rows = [(1, 1, -1, -1), (1, -1, 1, -1), (1, 1, 1, -1), (1, 1, 1, 1)]
    frame, voting_rule = labelled(votes(*rows), [1.0, 0.0, 1.0, 1.0])
    rows = breakdowns.leave_one_out(ballots(frame), voting_rule).to_dicts()
    without = {row["without"]: row for row in rows}
    assert list(without) == ["nobody", *NAMES]
    assert without["nobody"]["human"] == 1.0
    changes = ("ties_made", "ties_broken", "reversed")
    assert [without["nobody"][name] for name in changes] == [0, 0, 0]
    assert [without["a"][name] for name in changes] == [0, 2, 0]
    assert without["a"]["human_broken"] == 0.5  # -1 and -1: against people, with people
    assert without["d"]["human_broken"] == 0.5
    assert without["b"]["human_broken"] == 0.0  # -1 where people said 0, +1 where they said 1
    assert without["c"]["human_broken"] == 1.0


def test_leaving_one_of_an_odd_number_out_makes_ties() -> None:
    frame, voting_rule = labelled(votes((1, 1, -1), (1, 1, 1)))
    without = breakdowns.leave_one_out(ballots(frame), voting_rule)
    assert without["ties_made"].to_list() == [0, 1, 1, 0]
    assert without["ties_broken"].sum() == without["reversed"].sum() == 0
    assert without["human"].to_list() == [None] * 4


def test_leaving_a_heavy_voter_out_reverses() -> None:
    frame, voting_rule = labelled(votes((1, -1, -1), (1, 1, 1)), weights={"a": 3.0})
    without = breakdowns.leave_one_out(ballots(frame), voting_rule)
    assert without["reversed"].to_list() == [0, 1, 0, 0]
    alone, voting_rule = labelled(votes((1, -1), (1, 1)), rule=Rule.majority, human_votes=False)
    assert breakdowns.leave_one_out(ballots(alone), voting_rule)["ties_broken"].to_list() == [
        0,
        1,
        1,
    ]


def test_human_voter_can_be_left_out_too() -> None:
    frame, voting_rule = labelled(votes((1, -1), (1, 1)), [0.0, 1.0], human_votes=True)
    without = breakdowns.leave_one_out(ballots(frame), voting_rule)
    assert without["without"].to_list() == ["nobody", "a", "b", "human"]
    assert without["ties_made"].to_list() == [0, 0, 1, 1]


def test_ties_say_how_each_was_decided() -> None:
    rows = [(1, 1, -1, -1)] * 3 + [(1, -1, 0, 0)] + [(1, 1, 1, -1)]
    human = [1.0, 0.0, None, 0.5, 1.0]
    frame, voting_rule = labelled(votes(*rows), human, tie_rule=TieRule.human)
    ties = breakdowns.ties(ballots(frame), voting_rule.spec.rule.value)
    assert ties.rows() == [
        ("2 : 2", "human", 2, None),  # people agree with themselves
        ("2 : 2", "tie", 1, None),
        ("1 : 1", "tie", 1, None),
    ]
    assert compute_statistics(frame, voting_rule).human_agreement == 1.0  # the last pair alone
    assert breakdowns.margins(ballots(frame))["flips"].to_list() == [None, 0.0]
    frame, voting_rule = labelled(votes(*rows), human, tie_rule=TieRule.metric, tie_metric="a")
    assert breakdowns.ties(ballots(frame), "majority").row(0) == ("2 : 2", "metric:a", 3, 0.5)
    frame, voting_rule = labelled(votes(*rows), human, rule=Rule.unanimous)
    words = breakdowns.ties(ballots(frame), voting_rule.spec.rule.value)["outcome"].to_list()
    assert sorted(set(words)) == ["not_unanimous", "tie"]


def test_coalitions_know_no_side() -> None:
    rows = [(1, 1, -1, 0), (-1, -1, 1, 0), (1, 1, 1, 1), (-1, 1, 0, 0)]
    frame, voting_rule = labelled(votes(*rows), [1.0, 1.0, 0.5, 0.0])
    divisions = breakdowns.coalitions(ballots(frame), voting_rule, 10).rows()
    assert divisions[0] == ("a, b", "c", "d", 2, 0.5)
    assert set(divisions[1:]) == {("a, b, c, d", "", "", 1, None), ("a", "b", "c, d", 1, 1.0)}
    assert sum(row[3] for row in divisions) == 4


def test_groups_by_size_and_generator() -> None:
    rows = [(1, 1), (1, 1), (-1, -1), (1, -1)]
    frame, _ = labelled(votes(*rows), [1.0, 0.0, 0.0, None])
    frame = frame.with_columns(
        width_0=pl.Series([8, 8, 16, 8], dtype=pl.Int32),
        width_1=pl.Series([8, 8, 8, 8], dtype=pl.Int32),
    )
    sizes = {row["size"]: row for row in breakdowns.by_size(frame, 9).to_dicts()}
    assert sizes["8 x 8"]["pairs"] == 3
    assert sizes["8 x 8"]["decided"] == pytest.approx(2 / 3)
    assert sizes["8 x 8"]["unanimous"] == pytest.approx(2 / 3)
    assert sizes["8 x 8"]["human"] == 0.5
    assert sizes["two sizes"]["human"] == 1.0
    assert breakdowns.by_size(frame, 1)["size"].to_list() == ["8 x 8"]
    generators = pl.DataFrame(
        {"generator_0": ["x", "y", "y", None], "generator_1": ["y", "x", "y", "x"]}
    )
    groups = breakdowns.by_generator(frame, generators, 9).to_dicts()
    groups = {row["generators"]: row for row in groups}
    assert groups["x / y"]["pairs"] == 2
    assert groups["x / y"]["first_wins"] == 0.5  # x as image 0, then y as image 0
    assert groups["y / y"]["first_wins"] is None
    assert len(groups) == 2


def test_reasons_are_counted_by_kind() -> None:
    torn = "image {}: OSError: image file is truncated ({} bytes not processed)"
    given = [
        ("ok", ""), ("unreadable_image", torn.format(0, 12)), ("too_large", "image 0: 9000x9000"),
        ("unreadable_image", torn.format(1, 7)), ("unreadable_image", torn.format(0, 12)),
        ("empty_prompt", "the prompt is empty"),
    ]  # fmt: skip
    frame = scored(votes(*[(1, 1)] * len(given)), metrics=("a", "b")).with_columns(
        status=pl.Series([status for status, _ in given]),
        reason=pl.Series([reason for _, reason in given]),
    )
    labelled = label_pairs(frame, VotingRule(VoteSpec(), ("a", "b")))
    assert breakdowns.reasons(labelled, 2).rows() == [
        ("unreadable_image", torn.format("N", "N"), 3),
        ("empty_prompt", "the prompt is empty", 1),
    ]
    assert breakdowns.reasons(labelled, 9).rows()[2:] == [("too_large", "image N: NxN", 1)]
    assert labelled["reason"].to_list() == [reason for _, reason in given]  # in full


def test_statistics_count_every_pair_everywhere() -> None:
    rng = np.random.default_rng(7)
    human = rng.choice([0.0, 0.5, 1.0], 500).tolist()
    frame, voting_rule = labelled(rng.normal(size=(500, 4, 2)), human)
    statistics = compute_statistics(frame, voting_rule)
    assert sum(statistics.outcomes.values()) == sum(statistics.statuses.values()) == 500
    frames = {name: table.frame for name, table in statistics.tables.items()}
    for name in ("margins", "sizes", "coalitions"):
        assert frames[name]["pairs"].sum() == 500
    assert frames["ties"]["pairs"].sum() == statistics.outcomes["tie"]
    assert frames["without"]["ties_broken"].to_list() == [0, *[statistics.outcomes["tie"]] * 4]
    for gaps in statistics.gaps:
        assert sum(gaps.counts) == pytest.approx(495, abs=1)  # all but the outermost 1 %
