"""One step in the paper's order."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.dpo.draws import DrawRule, Draws, draw
from train.dpo.loss import Compared, Errors, denoising_errors, residual_overlap
from train.dpo.objectives import Criterion
from train.loader.image_source import Pictures
from train.loader.loader import PairBatch
from train.loader.transfer import moved, pinned
from train.models.components import Backbone, Denoiser, predict
from train.models.conditioning import Condition


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


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch with its random choices."""

    batch: PairBatch
    draws: Draws

    def on(self, device: torch.device) -> "Drawn":
        """The same where the step computes; sizes and dropped captions, the host must know."""
        batch = moved(self.batch, device, stay=("size",))
        return Drawn(batch, moved(self.draws, device, stay=("drop_caption",)))


def draw_for(batch: PairBatch, rule: DrawRule) -> Drawn:
    """What chance decides for a batch."""
    return Drawn(batch, draw(rule, batch.epoch, batch.pair_ids))


def drawn_ahead(
    batches: Iterator[PairBatch], rule: DrawRule, device: torch.device
) -> Iterator[Drawn]:
    """Batches and their draws where the device can fetch them; for the thread that reads ahead."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    for batch in batches:
        found = draw_for(batch, rule)
        yield Drawn(pinned(batch, device), pinned(found.draws, device))


@dataclass(frozen=True, slots=True)
class Question:
    """What a denoiser is asked about a batch; winners first, then losers."""

    noisy: Float[Tensor, "image channel height width"]
    timestep: Int[Tensor, " image"]
    condition: Condition
    target: Float[Tensor, "image channel height width"]
    """The right answer."""


def ask(drawn: Drawn, backbone: Backbone) -> Question:
    """Noise both pictures of each pair alike."""
    draws, schedule = drawn.draws, backbone.schedule
    latents, condition = encode(drawn.batch, backbone, draws)
    timestep, noise = twice(draws.timestep), twice(draws.noise)  # winner and loser share both
    noisy = schedule.noisy(latents, noise, timestep)
    return Question(noisy, timestep, condition, schedule.target(latents, noise, timestep))


def answer(
    unet: Denoiser, asked: Question, dtype: torch.dtype
) -> Float[Tensor, "image channel height width"]:
    """A denoiser's prediction, float32."""
    return predict(unet, asked.noisy, asked.timestep, asked.condition, dtype)


def step(drawn: Drawn, nets: Networks, criterion: Criterion) -> Outcome:
    """One step on this rank's pairs; with `dpo` it is Wallace et al. 2023, Eq. 14.

    Nothing in it waits for the device.
    """
    backbone = nets.backbone
    drawn = drawn.on(backbone.device)
    asked = ask(drawn, backbone)
    predicted = answer(nets.policy, asked, backbone.dtype)
    policy = denoising_errors(predicted, asked.target)
    overlap = residual_overlap(predicted, asked.target)
    with torch.inference_mode():
        predicted = answer(nets.reference, asked, backbone.dtype)
    reference = denoising_errors(predicted.clone(), asked.target)  # a copy that autograd may keep
    share = drawn.draws.timestep / len(backbone.schedule.alphas_cumprod)
    return outcome(Compared(policy, reference, overlap, drawn.batch.margin), criterion, share)


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
