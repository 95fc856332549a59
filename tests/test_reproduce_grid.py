"""The study in which every arm has its own beta: the choice, distances, intervals and pages."""

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.stats import t

from benchmarks import coverage
from benchmarks.reproduce import best, grid, grid_figures, grid_report, paper, work
from benchmarks.reproduce.crossed import interval, two_way_bootstrap
from benchmarks.reproduce.match import match
from benchmarks.reproduce.own_beta import ARMS, CLAIMS, STUDY
from benchmarks.reproduce.plan import BASE, JUDGE, VALIDATION, Plan, Unit
from conf.job import composed, settings
from data.artifacts.atomic import write_json
from data.artifacts.parquet_io import write_table
from data.artifacts.schemas import Role, sample_scores
from data.miniature.scenes import prompts
from evaluate.run import judges_of
from evaluate.statistics.winrate import Judge
from train.config import resumable_fields

JUDGES = (Judge("a", Role.VOTER), Judge("b", Role.VOTER), Judge("truth", Role.ORACLE))


def tiny_plan(folder, **changes):
    small = replace(STUDY.grid, betas=(500.0, 5000.0), prompts=20)
    settings = {"seeds": 2, "steps": 60, "prompts": 20, "pairs": 160, "grid": small} | changes
    arms = STUDY.named(["majority_frozen", "unanimous_frozen"])
    return Plan(study=STUDY, folder=folder / "own-beta", **{"arms": arms} | settings)


def frame(wins, judges=JUDGES, number=20):
    """Scores: 1 on the first so many prompts, by judge, then -1."""
    columns = {
        f"score_{judge.metric}": np.where(np.arange(number) < won, 1.0, -1.0).astype(np.float32)
        for judge, won in zip(judges, wins, strict=True)
    }
    rows = {"prompts_name": ["p"] * number, "prompt_id": range(number), "prompt": ["x"] * number,
            "seed": [0] * number, "model": ["m"] * number, "path": [""] * number}  # fmt: skip
    names = [judge.metric for judge in judges]
    return pl.from_arrow(pa.table(rows | columns, schema=sample_scores(names)))


def even(judges=JUDGES, number=20):
    """The base: 0 everywhere, between a win and a loss."""
    zero = pl.lit(0.0, pl.Float32)
    return frame([0] * len(judges), judges, number).with_columns(
        **{f"score_{judge.metric}": zero for judge in judges}
    )


# --- intervals -----------------------------------------------------------------------------------


def test_an_interval_by_hand():
    """Rows (1, 0), (1, 1), (0, 0): means 1/2, 1, 0 of rows and 2/3, 1/3 of columns; mean 1/2.

    Mean squares: prompts 2 (0 + 1/4 + 1/4) / 2 = 1/2; seeds 3 (1/36 + 1/36) / 1 = 1/6; residuals
    are +-1/3 in the first row and +-1/6 in the others, 2/9 + 4/36 = 1/3 over 2 degrees: 1/6.
    """
    estimate = interval(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    variance = 1 / 2 + 1 / 6 - 1 / 6
    freedom = variance**2 / (0.5**2 / 2 + (1 / 6) ** 2 / 1 + (1 / 6) ** 2 / 2)
    half = t.ppf(0.975, freedom) * np.sqrt(variance / 6)
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_trainings_that_agree_leave_the_interval_over_prompts():
    column = np.repeat([1.0, 0.5, 0.0, 1.0], 5)[:, None]
    one, five = interval(column), interval(np.tile(column, 5))
    half = t.ppf(0.975, 19) * column.std(ddof=1) / np.sqrt(20)
    assert one.high - one.value == pytest.approx(half)
    assert five.high == pytest.approx(one.high, abs=1e-6)
    assert interval(np.vstack([column, [[np.nan]]])) == one
    assert interval(np.ones((4, 2))) == interval(np.ones((4, 1)))


def test_intervals_cover_the_true_rate():
    """93 to 97 % but for the chance of 600 simulations; intervals over prompts alone do not."""
    inside, width = coverage.coverage(0.65, 0.2, interval, 600)
    assert 0.92 <= inside <= 0.975
    narrow, smaller = coverage.coverage(0.65, 0.2, coverage.over_prompts, 600)
    assert narrow < 0.9
    assert smaller < width


def test_the_two_way_bootstrap_resamples_seeds():
    outcomes = np.tile([1.0, 0.0], (10, 1))
    estimate = two_way_bootstrap(outcomes, resamples=200, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


# --- the choice and the distance -----------------------------------------------------------------


def test_the_best_beta_is_chosen_and_of_equal_ones_the_largest():
    assert grid.choose({500.0: 0.7, 1500.0: 0.8, 5000.0: 0.6}) == 1500
    assert grid.choose({500.0: 0.8, 1500.0: 0.8, 5000.0: 0.6}) == 1500


def test_a_distance_lies_between_two_betas():
    """0.04 is half way from 0.02 to 0.08 in the logarithm."""
    distances = {500.0: 0.32, 1500.0: 0.08, 5000.0: 0.02}
    (near, one), (far, other) = grid.neighbours(distances, 0.04)
    assert (near, far) == (5000, 1500)
    assert (one, other) == pytest.approx((0.5, 0.5))
    assert grid.neighbours(distances, 0.08) == ((5000, 0), (1500, 1))
    assert grid.neighbours(distances, 0.01) == grid.neighbours(distances, 0.4) == ()


def test_two_arms_share_the_distances_between_their_models():
    near, far = {500.0: 0.09, 5000.0: 0.02}, {500.0: 0.32, 5000.0: 0.04}
    assert grid.middle(near, far) == pytest.approx(0.06)
    assert grid.middle(near, {500.0: 0.5, 5000.0: 0.1}) is None


def test_a_mixture_has_the_mean_outcome():
    """Voter a wins 20 of 20 with one model and none with the other: 3/4 by weight; b wins half."""
    mixture = [(0.75, frame((20, 10, 0))), (0.25, frame((0, 10, 20)))]
    base = [(1.0, even())]
    each = match("x", BASE, {0: mixture, 1: mixture}, {0: base, 1: base, 2: base}, JUDGES)
    assert {name: rate.value for name, rate in each.rates.items()} == {
        "a": 0.75, "b": 0.5, "truth": 0.25, "average": 0.625,
    }  # fmt: skip
    assert (each.seeds, each.by_seed, each.weakest) == ((0, 1), (0.625, 0.625), "b")
    assert each.gain == pytest.approx((0.75 - 0.25) / 2)  # scores of 1 and -1 against zeros
    with pytest.raises(ValueError, match="x and base have no training seed in common"):
        match("x", BASE, {0: mixture}, {1: base}, JUDGES)


def test_a_claim_needs_the_whole_interval():
    base = {0: [(1.0, even())]}
    assert match("x", BASE, {0: [(1.0, frame((18, 18, 2)))]}, base, JUDGES).conclusion == "holds"
    worse = match("x", BASE, {0: [(1.0, frame((2, 2, 18)))]}, base, JUDGES)
    assert (worse.conclusion, worse.verdicts) == ("is contradicted", (1, 2))
    assert match("x", BASE, {0: [(1.0, frame((11, 9, 9)))]}, base, JUDGES).conclusion == (
        "is not shown"
    )


def test_a_front_has_the_arms_that_no_other_beats():
    near, good, bad, alike = ARMS[:4]
    points = {near: (1.0, 60.0), good: (2.0, 70.0), bad: (2.5, 65.0), alike: (2.0, 70.0)}
    assert grid_figures.best(points) == [near, good, alike]


# --- pieces --------------------------------------------------------------------------------------


def test_every_arm_is_tried_with_every_beta_before_it_gets_its_own(tmp_path):
    pieces = {piece.name: piece for piece in grid.pieces(tiny_plan(tmp_path))}
    tried = {
        f"{arm}_b{b}-0" for arm in ("majority_frozen", "unanimous_frozen") for b in (500, 5000)
    }
    first = {"shared", "base_validation", "base_judge"}
    assert list(pieces)[:3] == ["shared", "base_validation", "base_judge"]
    assert {name for name, piece in pieces.items() if piece.needs == first} == tried
    own = {name for name in tried if name.startswith("majority")}
    assert pieces["majority_frozen-1"].needs == pieces["majority_frozen-2"].needs == own
    assert len(pieces) == 3 + 4 + 4


def test_arms_differ_in_vote_reference_or_objective():
    names = {arm.name for arm in ARMS}
    assert len(names) == len({arm.overrides for arm in ARMS}) == len(ARMS) == 28
    assert STUDY.grid.shown | set(STUDY.quick_arms) <= names
    for arm, others in CLAIMS.values():
        assert {arm, *others} <= names
    arm = ARMS[0].at(1500.0)
    assert (arm.name, arm.overrides[-1]) == (f"{ARMS[0].name}_b1500", "train.beta=1500")


def test_the_checked_settings_are_those_of_the_experiment(tmp_path):
    """But for how often a run logs, writes checkpoints, and how it reads images."""
    plan = Plan(study=best.STUDY, folder=tmp_path, arms=best.STUDY.arms, seeds=3, steps=200,
                prompts=217, pairs=3000)  # fmt: skip
    ours, theirs = plan.unit_job(Unit(best.BEST, 11)), composed(["experiment=miniature_best"])
    free = dict.fromkeys(resumable_fields())
    assert settings(ours.train) | free == settings(theirs.train) | free
    assert (ours.vote, ours.model) == (theirs.vote, theirs.model)
    judged, first = plan.judge_job().evaluate.prompts, paper.STUDY.prompts
    assert (judged.skip_prompts, judged.max_prompts) == (first, len(prompts("test")) - first)
    assert not {*plan.training_seeds} & {0, *range(paper.STUDY.seeds), *range(1, 1 + STUDY.seeds)}


def save(plan, unit, where, wins, squared):
    """Scores and distance of a unit, as judging writes them."""
    judges = judges_of(plan.judge_job(where))
    scores = even(judges) if wins is None else frame((wins,) * len(judges), judges)
    write_table(work.scores_of(plan, unit, where), scores.to_arrow().cast(
        sample_scores([judge.metric for judge in judges])), {})  # fmt: skip
    if wins is not None:
        facts = {"squared_difference": [[squared]], "base_error": [[0.5]]}
        folder = plan.folder / where / "evaluate" / "distance"
        write_json(folder / f"denoiser-{unit.name}.json", {"facts": facts})


def test_a_report_of_what_is_finished(tmp_path):
    """The majority's own beta is 5000 and unanimity's 500; the common distance is between them."""
    plan = tiny_plan(tmp_path, seeds=1)
    first, second = plan.arms
    for where in (VALIDATION, JUDGE):
        save(plan, Unit(None, 0), where, None, 0)
    for arm, small, large in ((first, 12, 15), (second, 16, 14)):
        save(plan, Unit(arm.at(500.0), 0), VALIDATION, small, 0.08)
        save(plan, Unit(arm.at(5000.0), 0), VALIDATION, large, 0.02)
    progress = grid_report.Progress(plan)
    with pytest.raises(ValueError, match=r"has no arm yet.*run without --report"):
        grid_report.check(progress)
    save(plan, Unit(first.at(5000.0), 1), JUDGE, 13, 0.02)
    save(plan, Unit(second.at(500.0), 1), JUDGE, 18, 0.08)
    progress = grid_report.Progress(plan)
    assert progress.betas == {"majority_frozen": 5000, "unanimous_frozen": 500}
    assert progress.target == pytest.approx(0.1)  # of 0.04 and 0.16, the fractions of an error
    text = grid_report.results(progress)
    assert "| majority, frozen | 60.0 (16.0) | **75.0 (4.0)** |" in text
    assert "| unanimity, frozen | 500 | – | 90.0 (" in text
    assert "| The majority is better than unanimity, frozen | unanimity, frozen | 3" in text
    for table in (part for part in text.split("\n\n") if part.startswith("|")):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    paths = grid_report.save_figures(progress, tmp_path)
    assert all("majority" in path.read_text() for path in paths)
    assert set(grid.judged(plan)) >= {"majority_frozen-1", "unanimous_frozen_b500-0", "base"}
