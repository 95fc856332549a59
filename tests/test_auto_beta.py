"""`train.beta=auto` brings the mean gradient factor to its target, and says where it cannot."""

import math

import pytest

from train.config import AutoBetaSpec, Objective, ObjectiveSpec, ReferenceSpec, Refresh, TrainSpec
from train.dpo.auto_beta import STEEPEST, AutoBeta, adjusted, limits, mean_factor
from train.trainer.tally import quantiles

SPEC = AutoBetaSpec()


def test_the_factor_by_hand():
    """beta m / 2 = ln 3 has sigmoid(-u) = 1/4, its opposite 3/4, and 0 has 1/2."""
    m = 2 * math.log(3) / 5000
    assert mean_factor([m], 5000.0) == pytest.approx(0.25)
    assert mean_factor([m, -m, 0.0, m], 5000.0) == pytest.approx(1.75 / 4)
    assert mean_factor([1.0, -1.0, 0.0, 1.0], 1e30) == pytest.approx(1.5 / 4)  # 1 - accuracy
    assert math.isnan(mean_factor([m, math.nan], 5000.0))


def test_the_order_of_pairs_changes_no_bit():
    margins = [math.sin(i) * 1e-3 for i in range(1000)]
    assert len({mean_factor(margins[cut:] + margins[:cut], 5000.0) for cut in range(50)}) == 1


def test_the_steepest_slope():
    slopes = (u / (1 + math.exp(u)) / (1 + math.exp(-u)) for u in (i / 1000 for i in range(5000)))
    assert max(slopes) == pytest.approx(STEEPEST, abs=2e-4)


def test_a_step_by_hand():
    """Window 10: F = 0.5 + (0.2 - 0.5) / 10 = 0.47; k = 1 / 4.48, so beta grows by exp(0.07 k)."""
    after = adjusted(AutoBeta(5000.0), 0.2, SPEC)
    assert after.factor == pytest.approx(0.47)
    assert after.beta == pytest.approx(5000 * math.exp(0.07 / 4.48))
    assert adjusted(AutoBeta(5000.0), 0.2, SPEC, warming_up=True) == AutoBeta(5000.0, after.factor)


def test_beta_stays_in_its_range():
    low = high = AutoBeta(5000.0)
    for _ in range(1000):
        low, high = adjusted(low, 0.1, SPEC), adjusted(high, 0.5, SPEC)
    assert (low.beta, high.beta) == limits(SPEC) == (500.0, 50_000.0)


@pytest.mark.parametrize("start", [600.0, 5000.0, 45_000.0])
@pytest.mark.parametrize("window", [1, 10, 50])
def test_it_settles_without_swinging(start: float, window: int):
    """Margins of mean 3e-4 and spread 3e-4: the factor comes to 0.4, and hardly goes beyond."""
    spec, state = AutoBetaSpec(window=window), AutoBeta(start)
    margins = [3e-4 * (1 + math.sqrt(3) * (2 * (i + 0.5) / 64 - 1)) for i in range(64)]
    factors = []
    for _ in range(60 * window + 200):
        factors.append(mean_factor(margins, state.beta))
        state = adjusted(state, factors[-1], spec)
    assert factors[-1] == pytest.approx(0.4, abs=1e-3)
    beyond = [(f - 0.4) * math.copysign(1, factors[0] - 0.4) for f in factors]
    assert min(beyond) > -0.02


def test_quantiles_are_those_of_single_pairs():
    assert quantiles([float(i) for i in range(101)]) == [10.0 * i for i in range(11)]
    assert quantiles([3.0]) == [3.0] * 11
    assert quantiles([1.0, 2.0])[::10] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": "automatic"}, r"train\.beta=automatic; it must be a number above 0, or auto"),
        ({"beta": "nan"}, "train.beta=nan; it must be a number above 0"),
        ({"beta": -1.0}, "train.beta=-1.0; it must be a number above 0"),
        ({"auto_beta": AutoBetaSpec(target=0.3)}, "target=0.3 has no meaning for train.beta=5000"),
        *[
            ({"beta": "auto", "objective": ObjectiveSpec(kind=kind)}, f"kind={kind.value}, whose")
            for kind in (Objective.ipo, Objective.linear_dpo, Objective.mapo)
        ],
        (
            {"beta": "auto", "steps": 9, "warmup": 9},
            r"beta=auto never begins: train\.warmup=9 takes all of train\.steps=9",
        ),
        (
            {"beta": "auto", "objective": ObjectiveSpec(smoothing=0.4)},
            r"target=0\.4 is not above train\.objective\.smoothing=0\.4",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        TrainSpec(reference=ReferenceSpec(refresh=Refresh.frozen), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"target": 0.5}, {"start": 0.0}, {"range": 1.0}, {"window": 0}])
def test_its_own_settings_are_checked(change: dict[str, float]):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"train.auto_beta.{name}={value}; it must be"):
        AutoBetaSpec(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "beta"), [("2000", 2000.0), ("5e3", 5000.0), ("auto", "auto")])
def test_a_number_from_the_command_line_is_a_number(text: str, beta: float | str):
    assert TrainSpec(beta=text).beta == beta
