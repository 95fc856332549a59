"""Diffusion-DPO's arithmetic against the formula, written down a second time here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.models.forward_process import Prediction
from data.models.noise_schedule import NoiseSchedule
from train.dpo.loss import Errors, denoising_errors, dpo_losses, margin

BETA = 5000.0


def dpo_loss(policy: Errors, reference: Errors, beta: float) -> torch.Tensor:
    """Of a batch."""
    return dpo_losses(policy, reference, beta).mean()


def errors(seed: int, pairs: int = 24, scale: float = 1e-3) -> tuple[Errors, Errors]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(4, pairs, generator=generator)
    policy_w, policy_l, reference_w, reference_l = 0.1 + scale * base
    return Errors(policy_w, policy_l), Errors(reference_w, reference_l)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [1.0, 2000.0, 5000.0])
def test_the_loss_is_wallace_et_al_equation_14(seed: int, beta: float):
    """-log sigmoid(-beta/2 ((e_w - e_l) - (r_w - r_l))), averaged over pairs; here in float64."""
    policy, reference = errors(seed)
    e_w, e_l, r_w, r_l = (
        tensor.double().numpy()
        for tensor in (policy.winner, policy.loser, reference.winner, reference.loser)
    )
    inside = -0.5 * beta * ((e_w - e_l) - (r_w - r_l))
    expected = np.log1p(np.exp(-inside)).mean()
    assert dpo_loss(policy, reference, beta).item() == pytest.approx(expected, rel=2e-4)


def test_the_loss_of_predictions_is_the_published_codes():
    """From predictions to loss as train.py of Diffusion-DPO has it: l.1105-1145, in its words."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(6, 4, 8, 8, generator=generator)
    target = noise.repeat(2, 1, 1, 1)
    model_pred, ref_pred = (
        target + 0.1 * torch.randn(12, 4, 8, 8, generator=generator) for _ in range(2)
    )
    model_losses = (model_pred - target).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    model_diff = model_losses_w - model_losses_l
    ref_losses = (ref_pred - target).pow(2).mean(dim=[1, 2, 3])
    ref_losses_w, ref_losses_l = ref_losses.chunk(2)
    ref_diff = ref_losses_w - ref_losses_l
    inside_term = -0.5 * BETA * (model_diff - ref_diff)
    published = -torch.nn.functional.logsigmoid(inside_term).mean()
    policy, reference = denoising_errors(model_pred, target), denoising_errors(ref_pred, target)
    torch.testing.assert_close(dpo_loss(policy, reference, BETA), published, rtol=1e-4, atol=0)
    torch.testing.assert_close(policy.winner, model_losses_w)
    torch.testing.assert_close(policy.loser, model_losses_l)


def test_where_policy_and_reference_agree_the_loss_is_ln_2_bit_for_bit():
    policy, _ = errors(0, pairs=32)
    ln_2 = torch.tensor(math.log(2))
    assert torch.equal(dpo_losses(policy, policy, BETA), ln_2.expand(32))
    assert torch.equal(dpo_loss(policy, policy, BETA), ln_2)


def test_a_better_winner_and_a_worse_loser_lower_the_loss():
    reference = Errors(torch.tensor([0.1]), torch.tensor([0.1]))
    better = Errors(torch.tensor([0.09]), torch.tensor([0.11]))
    assert margin(better, reference).item() == pytest.approx(0.02)
    assert dpo_loss(better, reference, BETA) < math.log(2)
    assert dpo_loss(reference, better, BETA) > math.log(2)


def test_the_mean_is_taken_over_losses_not_before():
    reference = Errors(torch.zeros(2), torch.zeros(2))
    policy = Errors(torch.tensor([0.001, -0.001]), torch.zeros(2))  # margins cancel
    assert dpo_loss(policy, reference, BETA).item() > math.log(2) + 0.1


@given(st.integers(0, 10_000))
def test_swapping_the_images_negates_the_margin(seed: int):
    policy, reference = errors(seed, pairs=4)
    swapped = margin(Errors(policy.loser, policy.winner), Errors(reference.loser, reference.winner))
    assert torch.equal(swapped, -margin(policy, reference))


def test_low_precision_predictions_are_compared_in_float32():
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randn(4, 4, 16, 16, generator=generator).bfloat16()
    target = torch.randn(4, 4, 16, 16, generator=generator)
    errors = denoising_errors(predicted, target)
    exact = (predicted.double() - target.double()).pow(2).mean((1, 2, 3))
    assert errors.winner.dtype is torch.float32
    torch.testing.assert_close(torch.cat([errors.winner, errors.loser]).double(), exact, rtol=1e-6,
                               atol=0)  # fmt: skip


def test_the_gradient_lowers_winners_and_raises_losers():
    winner, loser = torch.tensor([0.1], requires_grad=True), torch.tensor([0.1], requires_grad=True)
    reference = Errors(torch.tensor([0.1]), torch.tensor([0.1]))
    dpo_loss(Errors(winner, loser), reference, BETA).backward()
    assert winner.grad is not None
    assert loser.grad is not None
    assert winner.grad.item() == pytest.approx(BETA / 4)  # sigmoid(0) beta / 2
    assert loser.grad.item() == pytest.approx(-BETA / 4)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_noising_and_targets_are_the_definitions(prediction: Prediction):
    """x_t and v by hand: alpha = cos, sigma = sin of an angle (Salimans and Ho 2022, App. D)."""
    angles = torch.tensor([0.1, 0.7, 1.4])
    schedule = NoiseSchedule(angles.cos().pow(2), prediction)
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    alpha, sigma = angles.cos().view(3, 1, 1, 1), angles.sin().view(3, 1, 1, 1)
    steps = torch.arange(3)
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, steps), alpha * latents + sigma * noise
    )
    velocity = alpha * noise - sigma * latents
    expected = noise if prediction is Prediction.epsilon else velocity
    torch.testing.assert_close(schedule.get_target(latents, noise, steps), expected)
