"""Every objective at values worked out by hand, its gradients' signs, and short runs of it."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import rank_programs
from tests.helpers_ranks import run_ranks, shared_place
from train.config import Objective, ObjectiveSpec, ReferenceSpec, Refresh, TrainSpec
from train.dpo.loss import (
    MAPO_S,
    Compared,
    Errors,
    anchor_losses,
    denoising_errors,
    dpo_losses,
    ipo_losses,
    lead,
    linear_dpo_losses,
    loser_scale,
    mapo_losses,
    mapo_score,
    margin_dpo_losses,
    residual_overlap,
    sdpo_losses,
)
from train.dpo.objectives import make_criterion

BETA = 5000.0
U = math.log(3)
"""The logit at which sigmoid is 3/4."""


def pair(winner: float, loser: float) -> Errors:
    return Errors(torch.tensor([winner]), torch.tensor([loser]))


def at_logit(u: float) -> tuple[Errors, Errors]:
    """Policy and reference with beta m / 2 = u for beta = BETA: the winner got better by m."""
    return pair(0.1 - 2 * u / BETA, 0.1), pair(0.1, 0.1)


def criterion_of(
    objective: ObjectiveSpec, vote_fraction: float = 1.0
) -> Callable[[Errors, Errors], Tensor]:
    """The losses of an objective for one pair, whose winner leads by one vote."""
    criterion = make_criterion(objective, np.ones(1, np.int8), 1000)(BETA)
    facts = torch.zeros(1), torch.ones(1, dtype=torch.int64), torch.tensor([vote_fraction])
    return lambda policy, reference: criterion.losses(Compared(policy, reference, *facts))


def gradients(losses: Callable[[Errors], Tensor], policy: Errors) -> tuple[float, float]:
    """Of the loss with respect to the winner's and the loser's error."""
    winner, loser = (side.clone().requires_grad_() for side in (policy.winner, policy.loser))
    both = torch.autograd.grad(losses(Errors(winner, loser)).sum(), (winner, loser))
    return both[0].item(), both[1].item()


# --- by hand -------------------------------------------------------------------------------------


def test_dpo_by_hand():
    """u = ln 3: sigmoid is 3/4, the loss ln 4/3; its slope in u is 3/4 - 1, u's in e_w -beta/2."""
    policy, reference = at_logit(U)
    assert dpo_losses(policy, reference, BETA).item() == pytest.approx(math.log(4 / 3), rel=1e-3)
    winner, loser = gradients(lambda own: dpo_losses(own, reference, BETA), policy)
    assert winner == pytest.approx(BETA / 8, rel=1e-3)
    assert loser == pytest.approx(-BETA / 8, rel=1e-3)


@pytest.mark.parametrize(("votes", "weight"), [(4, 1.6), (1, 0.4), (0, 0.0), (-2, 0.8)])
def test_margin_dpo_by_hand(votes: int, weight: float):
    """Votes 4, 1, 0 and -2 among pairs whose mean lead is 2.5; the side does not count."""
    policy, reference = at_logit(U)

    def losses(own: Errors) -> Tensor:
        return margin_dpo_losses(own, reference, BETA, torch.tensor([votes]), 2.5)

    assert losses(policy).item() == pytest.approx(weight * math.log(4 / 3), rel=1e-3)
    winner, loser = gradients(losses, policy)
    assert winner == pytest.approx(weight * BETA / 8, rel=1e-3)
    assert loser == pytest.approx(-weight * BETA / 8, rel=1e-3)


def test_margin_dpo_over_the_whole_set_is_ln_2_at_equality():
    """Leads of 3, 1, -2, 4, 0 and 2 have mean 2, so the last pair weighs exactly 1."""
    votes = torch.tensor([3, 1, -2, 4, 0, 2])
    same = Errors(torch.full((6,), 0.3), torch.full((6,), 0.2))
    losses = margin_dpo_losses(same, same, BETA, votes, votes.abs().double().mean().item())
    assert losses[5].item() == torch.tensor(math.log(2)).item()
    assert torch.equal(losses / losses[5], votes.abs() / 2)
    assert losses.mean().item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(("u", "loss", "slope"), [(0, 0.25, -1), (0.5, 0, 0), (2, 2.25, 3)])
def test_ipo_by_hand(u: float, loss: float, slope: float):
    """(u - 1/2)^2 with slope 2u - 1; it is 1/4 at margin 0, and past u = 1/2 it pulls back."""
    policy, reference = at_logit(u)
    assert ipo_losses(policy, reference, BETA).item() == pytest.approx(loss, abs=2e-3)
    winner, loser = gradients(lambda own: ipo_losses(own, reference, BETA), policy)
    assert winner == pytest.approx(-slope * BETA / 2, abs=5)
    assert loser == pytest.approx(slope * BETA / 2, abs=5)


@pytest.mark.parametrize(
    ("winner", "loser", "weight"),
    [(0.10, 0.10, 0.5), (0.09, 0.12, 0.2), (0.12, 0.09, 0.8), (0.02, 0.1, 0.1), (0.1, 0.01, 0.9)],
)
def test_linear_dpo_by_hand(winner: float, loser: float, weight: float):
    """beta = 50: w = 1/2 + 10 (e_w - e_l) for equal reference errors, between eta = 0.1 and 0.9."""
    policy, reference = pair(winner, loser), pair(0.1, 0.1)

    def losses(own: Errors) -> Tensor:
        return linear_dpo_losses(own, reference, 50.0, 0.1)

    assert losses(policy).item() == pytest.approx(weight * (winner - loser), abs=1e-7)
    assert gradients(losses, policy) == pytest.approx((weight, -weight), rel=1e-5)


def test_linear_dpo_subtracts_the_references_gap():
    """e_w - e_l = 0.03 and r_w - r_l = 0.02: w = 1/2 + 10 (0.03 - 0.02) = 0.6."""
    losses = linear_dpo_losses(pair(0.13, 0.1), pair(0.12, 0.1), 50.0, 0.0)
    assert losses.item() == pytest.approx(0.6 * 0.03, rel=1e-4)


def test_mapo_by_hand():
    """s e_w = ln 2 and s e_l = ln 3: scores ln 2 / 1 and ln 3 / 2, so exp(difference) = 2/3^0.5."""
    policy = pair(math.log(2) / MAPO_S, math.log(3) / MAPO_S)
    assert mapo_score(policy.winner).item() == pytest.approx(math.log(2))
    assert mapo_score(policy.loser).item() == pytest.approx(math.log(3) / 2)
    loss = 0.7 * 2 * math.log(2) + 0.1 * math.log(1 + math.sqrt(3) / 2)
    assert mapo_losses(policy, 1, 0.1, 0.7).item() == pytest.approx(loss)
    # p'(e) = s (exp(x) - 1 - x exp(x)) / (exp(x) - 1)^2 at x = s e: s (1 - 2 ln 2), s (2 - ln 27)/4
    away = 1 / (1 + 2 / math.sqrt(3))
    winner, loser = gradients(lambda own: mapo_losses(own, 1, 0.1, 0.7), policy)
    assert winner == pytest.approx(0.7 - 0.1 * away * MAPO_S * (1 - 2 * math.log(2)), rel=1e-5)
    assert loser == pytest.approx(0.1 * away * MAPO_S * (2 - math.log(27)) / 4, rel=1e-5)
    assert winner > 0 > loser


def test_mapo_at_small_errors():
    """p(e) = 1 - s e / 2 + ..., so that T (p(e_w) - p(e_l)) = T s (e_l - e_w) / 2."""
    logit = 1000 * MAPO_S * 1e-3 / 2
    expected = -0.1 * math.log(1 / (1 + math.exp(-logit)))
    loss = mapo_losses(pair(0.01, 0.011), 1000, 0.1, 0.0).item()
    assert loss == pytest.approx(expected, rel=1e-3)
    assert mapo_score(torch.zeros(1)).item() == pytest.approx(1)
    assert all(
        map(math.isfinite, gradients(lambda own: mapo_losses(own, 9, 1.0, 1.0), pair(0.0, 0.0)))
    )


# --- label smoothing -----------------------------------------------------------------------------


SMOOTHED = [Objective.dpo, Objective.margin_dpo, Objective.sdpo]


@pytest.mark.parametrize("kind", SMOOTHED)
@pytest.mark.parametrize(("p", "slope"), [(1.0, -0.25), (0.9, -0.15), (0.75, 0.0), (0.6, 0.15)])
def test_smoothing_by_hand(kind: Objective, p: float, slope: float):
    """u = ln 3: -p ln 3/4 - (1 - p) ln 1/4 with slope 3/4 - p in u; 0 at p = 3/4."""
    policy, reference = at_logit(U)
    losses = criterion_of(ObjectiveSpec(kind=kind, smoothing=round(1 - p, 2)))
    expected = -p * math.log(3 / 4) - (1 - p) * math.log(1 / 4)
    assert losses(policy, reference).item() == pytest.approx(expected, rel=1e-3)
    winner, loser = gradients(lambda own: losses(own, reference), policy)
    assert winner == pytest.approx(-slope * BETA / 2, abs=0.5)
    assert loser == pytest.approx(slope * BETA / 2, abs=0.5)


@pytest.mark.parametrize("kind", SMOOTHED)
@pytest.mark.parametrize(("fraction", "smoothing"), [(1.0, 0.0), (0.75, 0.25), (0.625, 0.375)])
def test_votes_smooth_by_the_losers_fraction(kind: Objective, fraction: float, smoothing: float):
    """3 votes to 1 are worth a smoothing of 1/4; 4 to 0 are the plain objective, bit for bit."""
    policy, reference = at_logit(-0.7)
    fixed = criterion_of(ObjectiveSpec(kind=kind, smoothing=smoothing))
    by_vote = criterion_of(ObjectiveSpec(kind=kind, vote_smoothing=True), fraction)
    assert torch.equal(by_vote(policy, reference), fixed(policy, reference))
    assert torch.equal(by_vote(policy, policy), torch.tensor([math.log(2)]))


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.0])
def test_even_and_overruled_votes_teach_no_direction(fraction: float):
    by_vote = criterion_of(ObjectiveSpec(vote_smoothing=True), fraction)
    same = pair(0.1, 0.2)
    assert gradients(lambda own: by_vote(own, same), same) == (0.0, 0.0)


# --- the winner anchor ----------------------------------------------------------------------------


def test_an_anchor_by_hand():
    """8 (e_w - r_w) at e_w = 0.1 and r_w = 0.15 is -0.4; its slope in e_w is 8, in e_l 0."""
    reference = pair(0.15, 0.2)

    def losses(own: Errors) -> Tensor:
        return anchor_losses(own, reference, 8.0) + 0 * own.loser

    assert losses(pair(0.1, 0.1)).item() == pytest.approx(-0.4, rel=1e-5)
    assert gradients(losses, pair(0.1, 0.1)) == (8.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "factor", "unit"),
    [("dpo", 0.5, BETA / 2), ("margin_dpo", 0.5, BETA / 2), ("sdpo", 0.5, BETA / 2),
     ("ipo", 1.0, BETA / 2), ("linear_dpo", 0.5, 1.0)],
)  # fmt: skip
def test_an_anchor_adds_to_the_objectives_factor(kind: str, factor: float, unit: float):
    """Where policy and reference agree: the loss is the objective's, the winner's pull has more."""
    plain = criterion_of(ObjectiveSpec(kind=Objective(kind)))
    anchored = criterion_of(ObjectiveSpec(kind=Objective(kind), anchor=0.25))
    same = pair(0.1, 0.2)
    assert torch.equal(plain(same, same), anchored(same, same))
    before = gradients(lambda own: plain(own, same), same)
    after = gradients(lambda own: anchored(own, same), same)
    assert before == pytest.approx((factor * unit, -factor * unit))
    assert after == pytest.approx(((factor + 0.25) * unit, -factor * unit))


# --- the safeguard -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "mu", "scale"),
    [(1.0, 0.0, 0.5), (1.0, 0.9, 0.05), (1.0, 1.0, 0.0), (0.05, 0.9, 1.0), (-1.0, 0.9, 1.0),
     (0.0, 0.0, 1.0)],
)  # fmt: skip
def test_the_losers_scale_by_hand(overlap: float, mu: float, scale: float):
    """(1 - mu) e_w / overlap at e_w = 1/2, no more than 1, and 1 where losers do not pull along."""
    computed = loser_scale(torch.tensor([0.5]), torch.tensor([overlap]), mu)
    assert computed.item() == pytest.approx(scale)


def test_sdpo_by_hand():
    """Residuals (1, 0) and (2, 1): e_w = 1/2, overlap 1, so mu = 0.9 leaves the loser 1/20."""
    predicted = torch.tensor([[1.0, 0.0], [2.0, 1.0]]).view(2, 1, 1, 2)
    target = torch.zeros_like(predicted)
    policy, overlap = denoising_errors(predicted, target), residual_overlap(predicted, target)
    assert overlap.item() == 1
    losses = sdpo_losses(policy, policy, BETA, overlap, 0.9)
    assert losses.item() == torch.tensor(math.log(2)).item()  # the values are DPO's, bit for bit
    slopes = gradients(lambda own: sdpo_losses(own, policy, BETA, overlap, 0.9), policy)
    assert slopes[0] == pytest.approx(BETA / 4)
    assert slopes[1] == pytest.approx(-BETA / 4 / 20)


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9, 1.0])
def test_a_safeguarded_step_does_not_raise_the_winners_error(mu: float):
    """In output space, where both gradients move one output: the rate is at most -mu |d_w|^2.

    Losers are three times the winner plus noise, so that plain DPO raises the winner's error.
    """
    generator = torch.Generator().manual_seed(0)
    winner = torch.randn(32, 4, 4, 4, generator=generator)
    noise = torch.randn(32, 4, 4, 4, generator=generator)
    sign = torch.where(torch.arange(32) % 4 == 0, -1.0, 1.0).view(-1, 1, 1, 1)  # some pull apart
    predicted = torch.cat([winner, 3 * sign * winner + noise])
    target = torch.zeros_like(predicted)
    reference = denoising_errors(predicted + 0.01, target)

    def rates(safe: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The winner's slope along the step, |g_w|^2, and its error after a small step."""
        outputs = predicted.clone().requires_grad_()
        errors = denoising_errors(outputs, target)
        overlap = residual_overlap(outputs, target)
        losses = (
            sdpo_losses(errors, reference, 2.0, overlap, mu)
            if safe
            else dpo_losses(errors, reference, 2.0)
        )
        (gradient,) = torch.autograd.grad(losses.sum(), outputs)
        along, other = gradient.chunk(2)
        step = -(along + other)
        after = (winner + 1e-3 * step).square().mean(dim=(1, 2, 3))
        return (along * step).sum(dim=(1, 2, 3)), along.square().sum(dim=(1, 2, 3)), after

    before = winner.square().mean(dim=(1, 2, 3))
    slope, own, after = rates(safe=True)
    assert (slope <= -mu * own + 1e-5 * own).all()
    assert (after <= before * (1 + 1e-5)).all()
    slope, _, after = rates(safe=False)
    pulls_along = sign.flatten() > 0
    assert (slope[pulls_along] > 0).all()
    assert (after > before)[pulls_along].all()


def test_the_overlap_of_a_residual_with_itself_is_its_error():
    predicted, target = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    twice, aim = torch.cat([predicted, predicted]), torch.cat([target, target])
    torch.testing.assert_close(
        residual_overlap(twice, aim), denoising_errors(twice, aim).winner, rtol=1e-6, atol=0
    )


def test_without_a_reference_the_margin_is_the_policys_lead():
    assert lead(pair(0.1, 0.3)).item() == pytest.approx(0.2)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("mu", 1.5, "train.objective.mu=1.5; it must be in"),
        ("eta", 0.6, "train.objective.eta=0.6; it must be in"),
        ("mapo_beta", 0.0, "mapo_beta=0.0; it must be above 0"),
        ("smoothing", 0.5, r"smoothing=0.5; it must be in \[0, 0.5\)"),
        ("smoothing", -0.1, "smoothing=-0.1; it must be in"),
        ("anchor", -1.0, "anchor=-1.0; it must not be negative"),
        ("winner_weight", -1.0, "winner_weight=-1.0; it must not be negative"),
    ],
)
def test_settings_are_checked(name: str, value: float, says: str):
    with pytest.raises(ValueError, match=says):
        ObjectiveSpec(**{name: value})


@pytest.mark.parametrize("kind", ["ipo", "linear_dpo", "mapo"])
def test_smoothing_is_refused_where_it_has_no_meaning(kind: str):
    with pytest.raises(ValueError, match=f"smoothing=0.1 has no meaning for .*kind={kind}"):
        ObjectiveSpec(kind=Objective(kind), smoothing=0.1)
    with pytest.raises(ValueError, match=f"vote_smoothing=true has no meaning for .*kind={kind}"):
        ObjectiveSpec(kind=Objective(kind), vote_smoothing=True)


def test_smoothing_has_one_source():
    with pytest.raises(ValueError, match="smoothing=0.1 and vote_smoothing=true both say"):
        ObjectiveSpec(smoothing=0.1, vote_smoothing=True)


def test_mapo_has_an_anchor_of_its_own():
    with pytest.raises(ValueError, match=r"anchor=0\.2 with .*kind=mapo.*winner_weight instead"):
        ObjectiveSpec(kind=Objective.mapo, anchor=0.2)


def test_mapo_renews_no_reference():
    mapo = ObjectiveSpec(kind=Objective.mapo)
    with pytest.raises(ValueError, match="choose reference=frozen"):
        TrainSpec(objective=mapo)
    TrainSpec(objective=mapo, reference=ReferenceSpec(refresh=Refresh.frozen))


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_four_steps_of_each_objective_and_distribution_of_timesteps(tmp_path: Path):
    """In one process, without checkpoints; whether the reference is run is counted."""
    run_ranks(tmp_path, 1, rank_programs.trains_by_each_objective, shared_place().root)


@pytest.mark.ranks
def test_a_whole_run_without_a_reference():
    place = shared_place()
    steps = ("train.steps=2", "train.checkpoint_every=2", "train.reference.every=2", "zero=stage0")
    place.train("mapo", "objective=mapo", "timesteps=bucketed", *steps)
    lines = place.journal("mapo")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1 for line in lines)
    assert {line["reference_winner_error"] for line in lines} == {None}
    assert {line["reference_loser_error"] for line in lines} == {None}
    assert {line["reference_version"] for line in lines} == {0}
    assert "NaN" not in (place.folder("mapo") / "journal.jsonl").read_text()
    card = (place.folder("mapo") / "pipeline" / "README.md").read_text()
    assert "| mapo, bucketed |" in card
    assert "| 0.1, 0.001 |" in card  # its own beta


@pytest.mark.ranks
def test_a_whole_run_smoothed_and_anchored_whose_rate_falls():
    place = shared_place()
    place.train(
        "smoothed", "train.objective.vote_smoothing=true", "train.objective.anchor=0.25",
        "train.lr_schedule=linear", "train.lr_end=0.5", "train.steps=3", "train.warmup=1",
        "train.lr=1e-3", "reference=frozen", "zero=stage0",
    )  # fmt: skip
    lines = place.journal("smoothed")
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 1e-3, 7.5e-4])
    assert lines[0]["loss"] == torch.tensor(math.log(2)).item()
    card = (place.folder("smoothed") / "pipeline" / "README.md").read_text()
    assert "| dpo + smoothed by votes + winner anchor 0.25, uniform |" in card
    assert "| 1 steps, linear, to 0.5 of lr |" in card
