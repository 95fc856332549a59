"""What chance decides belongs to the pair: not to its neighbours, its rank, or what ran before."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from data.images import Size
from train.config import TimestepSpec
from train.dpo import draws
from train.dpo.draws import (
    Bucketed,
    DrawRule,
    Draws,
    Importance,
    LogitNormal,
    TimestepRule,
    coprime_stride,
    uniform,
)

RULE = DrawRule(seed=7, num_timesteps=1000, latent_shape=lambda _: (4, 4, 4))
IDS = [f"pair-{i}" for i in range(12)]


def draw(rule: DrawRule, epoch: int, ids: list[str]) -> Draws:
    return draws.draw(rule, [epoch] * len(ids), ids, Size(32, 32))


def assert_equal(left: Draws, right: Draws) -> None:
    for name in ("timestep", "noise", "posterior", "flip", "drop_caption"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def rows(draws: Draws, index: slice) -> Draws:
    names = ("timestep", "noise", "posterior", "flip", "drop_caption")
    return Draws(*(getattr(draws, name)[index] for name in names))


@given(st.integers(1, 11))
def test_a_pair_meets_the_same_noise_in_any_batch(cut: int):
    whole = draw(RULE, 3, IDS)
    assert_equal(draw(RULE, 3, IDS[:cut]), rows(whole, slice(None, cut)))
    assert_equal(draw(RULE, 3, IDS[cut:]), rows(whole, slice(cut, None)))


def test_what_ran_before_does_not_matter():
    first = draw(RULE, 0, IDS)
    torch.manual_seed(123)
    torch.randn(100)
    assert_equal(draw(RULE, 0, IDS), first)


@pytest.mark.parametrize("other", ["seed", "epoch", "pair"])
def test_seed_epoch_and_pair_all_count(other: str):
    rule = replace(RULE, seed=8) if other == "seed" else RULE
    ids = ["pair-x"] * 12 if other == "pair" else IDS
    other_draws, base = draw(rule, int(other == "epoch"), ids), draw(RULE, 0, IDS)
    assert not torch.equal(other_draws.timestep, base.timestep)
    assert (other_draws.noise != base.noise).all()


def test_flips_and_dropped_captions_leave_the_noise_alone():
    plain = draw(RULE, 0, IDS)
    varied = draw(replace(RULE, flip=True, caption_dropout=0.5), 0, IDS)
    assert torch.equal(plain.noise, varied.noise)
    assert torch.equal(plain.timestep, varied.timestep)
    assert torch.equal(plain.posterior, varied.posterior)
    assert not plain.flip.any()
    assert not plain.drop_caption.any()


def test_rates_are_as_asked():
    ids = [str(i) for i in range(4000)]
    drawn = draw(DrawRule(seed=0, num_timesteps=10, latent_shape=lambda _: (1, 2, 2), flip=True,
                          caption_dropout=0.2), 0, ids)  # fmt: skip
    assert drawn.flip.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert drawn.drop_caption.float().mean().item() == pytest.approx(0.2, abs=0.03)
    counts = torch.bincount(drawn.timestep, minlength=10)
    assert counts.shape == (10,)  # 0 .. 9, nothing beyond
    assert (counts - 400).abs().max() < 100  # five standard deviations
    assert drawn.noise.mean().item() == pytest.approx(0, abs=0.05)
    assert drawn.noise.std().item() == pytest.approx(1, abs=0.05)
    every = draw(replace(RULE, caption_dropout=1.0), 0, ids)
    assert every.drop_caption.all()


def test_winner_and_loser_have_their_own_place_in_the_posterior():
    drawn = draw(RULE, 0, IDS)
    assert (drawn.posterior[:, 0] != drawn.posterior[:, 1]).any(dim=(1, 2, 3)).all()


# --- timesteps -----------------------------------------------------------------------------------

RULES = [uniform, Importance((1.0, 0.0, 2.0)), Bucketed(7), LogitNormal(0.0, 1.0)]


def timesteps(rule: TimestepRule, pairs: int, epoch: int = 0, num_timesteps: int = 1000) -> Tensor:
    draw_rule = DrawRule(
        seed=3, num_timesteps=num_timesteps, latent_shape=lambda _: (1, 1, 1), timesteps=rule
    )
    return draw(draw_rule, epoch, [f"pair-{i}" for i in range(pairs)]).timestep


@pytest.mark.parametrize("rule", RULES)
def test_timesteps_belong_to_the_pair_and_leave_all_else_alone(rule: TimestepRule):
    draw_rule = replace(RULE, timesteps=rule)
    whole, plain = draw(draw_rule, 3, IDS), draw(RULE, 3, IDS)
    assert_equal(draw(draw_rule, 3, IDS[5:]), rows(whole, slice(5, None)))
    assert_equal(whole, replace(plain, timestep=whole.timestep))
    assert whole.timestep.dtype is torch.int64


def test_uniform_timesteps_are_pinned():
    """A change of the stream of random numbers changes every run; it must not come by accident."""
    assert draw(RULE, 0, IDS[:6]).timestep.tolist() == [815, 369, 691, 184, 827, 835]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (uniform, [1] * 10),
        (Bucketed(10), [1] * 10),
        (Bucketed(4), [1] * 10),
        (Importance((1.0,)), [1] * 10),
        (Importance((1.0, 2.0, 0.0, 4.0, 0.5)), [1, 1, 2, 2, 0, 0, 4, 4, 0.5, 0.5]),
    ],
)
@pytest.mark.parametrize("epoch", [0, 5])
def test_timesteps_are_distributed_as_asked(rule: TimestepRule, expected: list[float], epoch: int):
    """Tenths of the schedule against their density: chi-square over 5000 pairs of a fixed seed."""
    counts = np.bincount(timesteps(rule, 5000, epoch).numpy() // 100, minlength=10)
    density = np.array(expected) / sum(expected)
    assert (counts[density == 0] == 0).all()
    drawn = density > 0
    assert chisquare(counts[drawn], 5000 * density[drawn]).pvalue > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_every_timestep_can_be_drawn_and_none_beyond(rule: TimestepRule):
    drawn = set(timesteps(rule, 600, num_timesteps=9).tolist())
    assert drawn == (set(range(9)) - {3, 4, 5} if rule == RULES[1] else set(range(9)))


@pytest.mark.parametrize("buckets", [1, 2, 5, 6, 10])
def test_in_as_many_epochs_a_pair_visits_each_bucket_once(buckets: int):
    """From any epoch on; 600 timesteps, so that each bucket holds as many."""
    rule = Bucketed(buckets)
    visits = [timesteps(rule, 40, 2 + epoch, 600) // (600 // buckets) for epoch in range(buckets)]
    assert torch.equal(
        torch.stack(visits).sort(0).values, torch.arange(buckets)[:, None].expand(-1, 40)
    )


def test_neighbouring_epochs_are_far_apart():
    assert [coprime_stride(count) for count in (1, 2, 5, 10, 13)] == [1, 1, 3, 7, 8]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"weights": []}, "give at least one number"),
        ({"weights": [1.0, -1.0]}, "none negative"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"weights": [float("nan")]}, "none negative"),
        ({"buckets": 0}, "train.timesteps.buckets=0; it must be at least 1"),
        ({"std": 0.0}, "train.timesteps.std=0.0; it must be above 0"),
        ({"mean": float("inf")}, "train.timesteps.mean=inf; it must be a number"),
        ({"mean": 1.0}, "mean=1 and std=1 have no meaning for train.timesteps.kind=uniform"),
        ({"shift": 0.0}, "train.timesteps.shift=0.0; it must be above 0, or null"),
    ],
)
def test_timestep_settings_are_checked(wrong: dict[str, object], says: str):
    with pytest.raises(ValueError, match=says):
        TimestepSpec(**wrong)  # type: ignore[arg-type]
