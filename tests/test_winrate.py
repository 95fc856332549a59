import ast
import math
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.stats import binom, bootstrap, norm

from data.artifacts import schemas
from data.artifacts.schemas import Role
from evaluate.reporting.summary import sentence, win_rate_table
from evaluate.statistics.bootstrap import Bootstrap, holm, per_prompt, resampled, sign_test
from evaluate.statistics.power import needed_prompts
from evaluate.statistics.winrate import Balance, Judge, Verdict, compare

VOTER = Judge("m", Role.VOTER)


def scores_of(base, model, *, metrics=("m",), seeds=1):
    """A score table from arrays (prompt x seed, metric) of the base and of the model."""
    rows = []
    for name, values in (("base", base), ("new", model)):
        values = np.asarray(values, dtype=float).reshape(-1, seeds, len(metrics))
        for prompt, seed in np.ndindex(values.shape[:2]):
            scores = {
                f"score_{metric}": None if math.isnan(value) else value
                for metric, value in zip(metrics, values[prompt, seed], strict=True)
            }
            facts = {"prompts_name": "p", "prompt_id": 3 * prompt, "prompt": f"{prompt}"}
            rows.append(facts | {"seed": seed, "model": name, "path": ""} | scores)
    return pl.from_arrow(pa.Table.from_pylist(rows, schema=schemas.sample_scores(metrics)))


def run(base, model, judges=(VOTER,), *, resamples=2000, seed=0, **more):
    frame = scores_of(base, model, metrics=[judge.metric for judge in judges], **more)
    return compare(frame, judges, "base", "new", resamples=resamples, seed=seed)


def test_wins_ties_and_losses_by_hand():
    """Gaps +1, +2, 0, -1, and one pair without a score: 2 wins, 1 tie, 1 loss; (2 + .5) / 4."""
    (rate,) = run([1, 1, 1, 1, math.nan], [2, 3, 1, 0, 5]).rates
    assert (rate.wins, rate.ties, rate.losses, rate.unscored) == (2, 1, 1, 1)
    assert rate.win_rate.value == 2.5 / 4
    assert rate.change.value == (1 + 2 + 0 - 1) / 4
    assert (rate.mean_base, rate.mean_model) == (1.0, 1.5)
    assert rate.prompts == 4
    assert rate.p_value == 1.0  # two wins of three: 2 * P(X >= 2) = 1


def test_gaps_up_to_the_tie_threshold_are_ties():
    judge = Judge("m", Role.VOTER, tie=0.5)
    (rate,) = run([0, 0, 0], [0.5, 0.75, -0.25], (judge,)).rates
    assert (rate.wins, rate.ties, rate.losses) == (1, 2, 0)


def test_an_image_that_only_one_model_has_is_counted():
    frame = scores_of([1, 1, 1], [2, 2, 2])
    frame = frame.filter(~((pl.col("model") == "new") & (pl.col("prompt_id") == 3)))
    (rate,) = compare(frame, [VOTER], "base", "new", resamples=100, seed=0).rates
    assert (rate.wins, rate.unscored, rate.prompts) == (2, 1, 2)


def test_an_image_scored_twice_is_refused():
    frame = scores_of([1, 1], [2, 2])
    with pytest.raises(pl.exceptions.ComputeError, match="1:1"):
        compare(pl.concat([frame, frame]), [VOTER], "base", "new", resamples=10, seed=0)


def test_a_judge_without_any_score_is_refused():
    with pytest.raises(ValueError, match="'m' scored no image"):
        run([math.nan], [1])


def test_voters_that_share_no_prompt_are_refused():
    judges = [Judge("a", Role.VOTER), Judge("b", Role.VOTER)]
    with pytest.raises(ValueError, match=r"no prompt was scored by all voters \(a, b\)"):
        run([[math.nan, 1], [1, math.nan]], [[1, 2], [2, 1]], judges)


def test_swapping_the_models_mirrors_everything():
    rng = np.random.default_rng(1)
    base, model = rng.normal(size=(2, 80, 2))
    model[:, 0] += 0.5
    base[3, 1] = model[3, 1]
    judges = [Judge("a", Role.VOTER), Judge("b", Role.HELD_OUT)]
    one, other = run(base, model, judges), run(model, base, judges)
    for here, there in zip(one.rates, other.rates, strict=True):
        assert (here.wins, here.ties) == (there.losses, there.ties)
        assert here.win_rate.value == pytest.approx(1 - there.win_rate.value)
        assert here.win_rate.low == pytest.approx(1 - there.win_rate.high)
        assert here.change.low == pytest.approx(-there.change.high)
        assert here.p_value == there.p_value
    assert one.joint_dominance == other.joint_loss


def test_nothing_depends_on_the_order_of_rows_or_judges():
    rng = np.random.default_rng(2)
    base, model = rng.normal(size=(2, 60, 2))
    judges = [Judge("a", Role.VOTER), Judge("b", Role.VOTER)]
    frame = scores_of(base, model, metrics=["a", "b"])
    one = compare(frame, judges, "base", "new", resamples=300, seed=0)
    two = compare(
        frame.sample(fraction=1, shuffle=True, seed=1), judges[::-1], "base", "new", resamples=300,
        seed=0,
    )  # fmt: skip
    assert one.rates[0].win_rate == two.rates[1].win_rate
    assert one.average.value == pytest.approx(two.average.value)
    assert one.average.low == pytest.approx(two.average.low)


def test_joint_dominance_counts_prompts_where_every_voter_wins():
    """0 all win, 1 split, 2 all lose, 3 one tie, 4 one voter blind; the oracle is no voter."""
    judges = [Judge("a", Role.VOTER), Judge("b", Role.VOTER), Judge("o", Role.ORACLE)]
    gaps = np.array([[1, 1, -1], [1, -1, 1], [-1, -1, 1], [1, 0, 1], [1, math.nan, 1]])
    comparison = run(np.zeros((5, 3)), gaps, judges)
    assert comparison.joint_dominance.value == 1 / 4
    assert comparison.joint_loss.value == 1 / 4
    # voters: a wins 4 of 5, b wins 1 and ties 1 of 4
    assert comparison.average.value == pytest.approx((4 / 5 + 1.5 / 4) / 2)


def test_seeds_of_a_prompt_are_resampled_together():
    """Ten seeds that all say the same as the first tell nothing more: the interval is as wide."""
    rng = np.random.default_rng(3)
    gaps = rng.normal(size=(100, 1))
    (one,) = run(np.zeros(100), gaps).rates
    (ten,) = run(np.zeros(1000), np.repeat(gaps, 10, axis=1), seeds=10).rates
    assert ten.seeds == 10
    assert ten.wins == 10 * one.wins
    assert ten.win_rate == one.win_rate
    assert ten.p_value == one.p_value


def test_a_clean_sweep_of_few_prompts_shows_little():
    """Five wins of five: the exact limit is 0.025 ** (1 / 5) = 0.478, p = 2 / 32."""
    (rate,) = run(np.zeros(5), np.ones(5)).rates
    assert rate.win_rate.value == rate.win_rate.high == 1
    assert rate.win_rate.low == pytest.approx(0.025 ** (1 / 5))
    assert rate.p_value == pytest.approx(2 / 32)
    assert rate.verdict is Verdict.NOT_SHOWN
    (rate,) = run(np.zeros(12), -np.ones(12)).rates
    assert rate.win_rate.high == pytest.approx(1 - 0.025 ** (1 / 12))
    assert rate.verdict is Verdict.WORSE


def test_equal_models_show_nothing():
    comparison = run(np.ones(30), np.ones(30))
    assert comparison.rates[0].win_rate.value == 0.5
    assert comparison.rates[0].p_value == 1.0
    assert comparison.balance is Balance.NOT_SHOWN


@pytest.mark.parametrize(
    ("gains", "expected", "words"),
    [
        (
            (1, 1, 1),
            Balance.BALANCED,
            "better than base on 2 of 2 voting metrics and worse on none: balanced.",
        ),
        ((1, 0, 0), Balance.BALANCED, "on 1 of 2 voting metrics and worse on none: balanced."),
        (
            (1, 1, -1),
            Balance.NOT_BALANCED,
            "on 2 of 2 voting metrics and worse on c: not balanced.",
        ),
        (
            (0, 0, 0),
            Balance.NOT_SHOWN,
            "No difference between new and base has been shown by any metric.",
        ),
    ],
)
def test_balanced_needs_a_gain_and_no_loss_by_any_judge(gains, expected, words):
    judges = [Judge("a", Role.VOTER), Judge("b", Role.VOTER), Judge("c", Role.HELD_OUT)]
    comparison = run(np.zeros((40, 3)), np.tile(np.array(gains), (40, 1)), judges)
    assert comparison.balance is expected
    assert words in sentence(comparison)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "seeds", "rates", "shared"),
    [
        (150, 1, (0.55, 0.1, 0.35), 0.0),
        (300, 1, (0.75, 0.0, 0.25), 0.0),
        (200, 3, (0.5, 0.0, 0.5), 0.9),
        (100, 4, (0.6, 0.1, 0.3), 0.7),
    ],
)
def test_intervals_hold_the_truth_95_times_in_100(prompts, seeds, rates, shared):
    """800 experiments with a known win rate; `shared` is the correlation within a prompt.

    Coverage has to lie within 93 and 97 %. Its own standard error is 0.8 % here.
    """
    rng, hits, number = np.random.default_rng(prompts), 0, 800
    win, tie, _ = rates
    cuts = norm.ppf([1 - win - tie, 1 - win])
    for trial in range(number):
        common = rng.normal(size=(prompts, 1))
        luck = np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal(size=(prompts, seeds))
        gaps = np.searchsorted(cuts, luck.ravel()) - 1  # -1, 0 or 1, each with its rate
        low, high = _interval(gaps, trial, prompt=np.repeat(np.arange(prompts), seeds))
        hits += low <= win + tie / 2 <= high
    assert 0.93 <= hits / number <= 0.97


def test_images_of_a_prompt_are_not_independent_witnesses():
    """Seeds of a prompt fraction most of its luck; resampling images would cover far too little."""
    rng, hits, naive = np.random.default_rng(6), 0, 0
    for trial in range(200):
        luck = rng.normal(size=(80, 1)) + 0.3 * rng.normal(size=(80, 4))
        low, high = _interval(luck.ravel(), trial, prompt=np.repeat(np.arange(80), 4))
        hits += low <= 0.5 <= high
        low, high = _interval(luck.ravel(), trial)
        naive += low <= 0.5 <= high
    assert hits >= binom.ppf(1e-4, 200, 0.94)
    assert naive < binom.ppf(1e-4, 200, 0.94)


def _interval(gaps, trial, prompt=None):
    prompt = np.arange(len(gaps)) if prompt is None else prompt
    column = per_prompt((1 + np.sign(gaps)) / 2, prompt)
    estimate = Bootstrap({"m": column}, resamples=1000, seed=trial).mean("m", is_rate=True)
    return estimate.low, estimate.high


def test_the_interval_is_scipy_s_percentile_bootstrap():
    """Same estimator, other random draws: the ends differ by the resampling error alone."""
    rng = np.random.default_rng(9)
    outcomes = rng.choice([1, 0.5, 0], size=120, p=[0.5, 0.2, 0.3])
    ours = Bootstrap({"m": per_prompt(outcomes, np.arange(120))}, resamples=10_000, seed=0)
    low, high = (ours.mean("m", is_rate=True).low, ours.mean("m", is_rate=True).high)
    theirs = bootstrap(
        (outcomes,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx(theirs, abs=0.01)  # an outcome moves a mean by 0.004


@pytest.mark.slow
def test_equal_models_are_seldom_called_different():
    """Type I error of the verdict: at most 5 % of 400 experiments, within binomial error."""
    rng = np.random.default_rng(7)
    gaps = rng.normal(size=(400, 60))
    called = sum(
        run(np.zeros(60), row, resamples=500).rates[0].verdict is not Verdict.NOT_SHOWN
        for row in gaps
    )
    assert called <= binom.ppf(1 - 1e-4, 400, 0.05)


def test_holm_keeps_the_chance_of_any_false_finding():
    """Six judges, no difference anywhere: some adjusted p is below 5 % in at most 5 % of tables."""
    rng = np.random.default_rng(10)
    num_findings = 0
    for _ in range(500):
        p_values = [sign_test((rng.random(60) < 0.5).astype(float)) for _ in range(6)]
        num_findings += min(holm(p_values)) <= 0.05
    assert num_findings <= binom.ppf(1 - 1e-4, 500, 0.05)


def test_a_true_gain_is_detected():
    """60 % of 400 prompts: the power of the sign test is 0.98."""
    rng = np.random.default_rng(8)
    num_better = sum(
        run(np.zeros(400), rng.choice([1, -1], size=400, p=[0.6, 0.4]), resamples=500)
        .rates[0].verdict is Verdict.BETTER
        for _ in range(50)
    )  # fmt: skip
    assert num_better >= binom.ppf(1e-4, 50, 0.97)


def test_resamples_are_as_large_as_the_prompt_set():
    sums = np.ones((7, 2))
    assert (resampled(sums, 1234, seed=0) == 7).all()
    assert resampled(sums, 1234, seed=0).shape == (1234, 2)
    spread = resampled(np.eye(7), 20_000, seed=0)  # how often each prompt was drawn: mean 1
    assert spread.mean(0) == pytest.approx(np.ones(7), abs=5 * np.sqrt(6 / 7 / 20_000))
    assert spread.var(0) == pytest.approx(np.full(7, 6 / 7), rel=0.1)


def test_sign_test_by_hand():
    """Nine wins of ten: 2 * (1 + 10) / 2 ** 10; ties change nothing."""
    outcomes = np.array([1.0] * 9 + [0.0])
    assert sign_test(outcomes) == pytest.approx(22 / 1024)
    assert sign_test(np.append(outcomes, [0.5] * 20)) == pytest.approx(22 / 1024)
    assert sign_test(np.array([0.5])) == 1.0


def test_holm_by_hand():
    """Sorted .01 .02 .03 .5 times 4 3 2 1 is .04 .06 .06 .5, never falling."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("module", ["bootstrap", "power", "winrate"])
def test_statistics_are_pure(module):
    """They know no file format and no path, and of the program only names and each other."""
    tree = ast.parse(Path(f"evaluate/statistics/{module}.py").read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not names & {"json", "os", "pathlib", "pyarrow", "torch"}
    own = {name for name in names if name.split(".")[0] in ("data", "generate", "evaluate")}
    assert all(n.startswith("evaluate.statistics.") for n in own - {"data.artifacts.schemas"})


def test_the_table_has_the_declared_schema():
    comparison = run([1, 1, 1, 1], [2, 3, 1, 0])
    written = win_rate_table([comparison], "set")
    assert written.schema.equals(schemas.WIN_RATES)
    row = written.to_pylist()[0]
    assert row["wins"] + row["ties"] + row["losses"] == row["prompts"] * row["seeds"] == 4
    assert row["win_rate"] == 0.625
    assert (row["prompts_name"], row["role"], row["base"], row["model"]) == (
        "set", "voter", "base", "new",
    )  # fmt: skip


def test_needed_prompts_allow_for_ties():
    """60 wins, 40 losses, 100 ties: half of the prompts decide, so twice as many are needed."""
    (rate,) = run(np.zeros(200), np.repeat([1, -1, 0], [60, 40, 100])).rates
    assert rate.needed == 2 * needed_prompts(0.6)
    (rate,) = run(np.zeros(10), np.zeros(10)).rates
    assert rate.needed is None
