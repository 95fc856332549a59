"""One step in the paper's order."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from train.backbone import Backbone, Denoiser, predict
from train.choices import Criterion
from train.conditioning import Condition
from train.loss import Compared, Errors, denoising_errors, residual_overlap
from train.noise import DrawRule, Draws, draw
from train.payload import Pictures
from train.stream import PairBatch


@dataclass(frozen=True, slots=True)
class Networks:
    """The three nets of a step."""

    backbone: Backbone
    policy: Denoiser
    reference: Denoiser
    """`absent` where the objective asks none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a forward pass found; all but `loss` is detached and per pair."""

    loss: Float[Tensor, ""]
    """Mean over the pairs; its gradient trains the policy."""
    losses: Float[Tensor, " pair"]
    margin: Float[Tensor, " pair"]
    """The objective's; above 0 where the policy does as the label says."""
    policy: Errors
    reference: Errors
    """NaN where the objective asks no reference."""
    timestep: Float[Tensor, " pair"]
    """As a share of the schedule, in [0, 1)."""


def step(batch: PairBatch, nets: Networks, rule: DrawRule, criterion: Criterion) -> Outcome:
    """One step on this rank's pairs; with `dpo` it is Wallace et al. 2023, Eq. 14."""
    draws = draw(rule, batch.epoch, batch.pair_ids)
    backbone, schedule = nets.backbone, nets.backbone.schedule
    latents, condition = encode(batch, backbone, draws)
    timestep = twice(draws.timestep.to(backbone.device))  # winner and loser share both
    noise = twice(draws.noise.to(backbone.device))
    noisy = schedule.noisy(latents, noise, timestep)
    target = schedule.target(latents, noise, timestep)
    predicted = predict(nets.policy, noisy, timestep, condition, backbone.dtype)
    policy, overlap = denoising_errors(predicted, target), residual_overlap(predicted, target)
    with torch.inference_mode():
        predicted = predict(nets.reference, noisy, timestep, condition, backbone.dtype)
    reference = denoising_errors(predicted.clone(), target)  # a copy that autograd may keep
    share = (draws.timestep / rule.num_timesteps).to(backbone.device)
    compared = Compared(policy, reference, overlap, batch.margin.to(backbone.device))
    return outcome(compared, criterion, share)


def outcome(found: Compared, criterion: Criterion, share: Float[Tensor, " pair"]) -> Outcome:
    """The loss to differentiate, and what the journal wants to know of each pair."""
    losses, policy = criterion.losses(found), found.policy.detached()
    judged = criterion.margin(policy, found.reference)
    return Outcome(losses.mean(), losses.detach(), judged, policy, found.reference, share)


def absent(noisy: Tensor, *_: object, **__: object) -> tuple[Tensor]:
    """In the reference's place where none is asked: computes nothing, and answers NaN."""
    return (torch.full_like(noisy, torch.nan),)


@torch.no_grad()
def encode(
    batch: PairBatch, backbone: Backbone, draws: Draws
) -> tuple[Float[Tensor, "image channel height_8 width_8"], Condition]:
    """Latents and text of a batch: winners first, then losers; both of a pair mirrored or none."""
    pictures = torch.cat([facing(side, draws.flip) for side in (batch.winner, batch.loser)])
    posterior = torch.cat([draws.posterior[:, 0], draws.posterior[:, 1]])
    made = backbone.drawn if pictures.is_floating_point() else backbone.encode_pictures
    latents = made(pictures, posterior)
    dropped = draws.drop_caption.tolist()
    prompts = ["" if d else text for d, text in zip(dropped, batch.prompts, strict=True)]
    return latents, backbone.condition(prompts, batch.size)


def facing(side: Pictures, mirror: Bool[Tensor, " pair"]) -> Tensor:
    """One side's pixels, or moments of latents; mirrored left to right where asked."""
    if not side.is_floating_point():
        return torch.where(mirror.view(-1, 1, 1, 1), side.flip(2), side)
    upright, mirrored = side[:, 0], side[:, -1]  # the same where nothing is ever mirrored
    return torch.where(mirror.view(-1, 1, 1, 1, 1), mirrored, upright)


def twice(tensor: Tensor) -> Tensor:
    """The same for winners and losers, which follow each other."""
    return torch.cat([tensor, tensor])
