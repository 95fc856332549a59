"""One step in the paper's order."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.dpo.draws import DrawRule, Draws, draw
from train.dpo.loss import Compared, Errors, denoising_errors, residual_overlap
from train.dpo.objectives import Criterion
from train.loader.image_source import Images
from train.loader.loader import PairBatch
from train.loader.transfer import moved, pinned
from train.models.components import Denoiser, ModelComponents, run_denoiser
from train.models.conditioning import Condition


@dataclass(frozen=True, slots=True)
class Models:
    """The three models of a step."""

    components: ModelComponents
    policy: Denoiser
    reference: Denoiser
    """`absent` where the objective asks none."""


@dataclass(frozen=True, slots=True)
class StepOutput:
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
class BatchWithNoise:
    """A batch with its random choices."""

    batch: PairBatch
    draws: Draws

    def on(self, device: torch.device) -> "BatchWithNoise":
        """The same where the step computes; sizes and dropped captions, the host must know."""
        batch = moved(self.batch, device, stay=("size",))
        return BatchWithNoise(batch, moved(self.draws, device, stay=("drop_caption",)))


def draw_noise(batch: PairBatch, rule: DrawRule) -> BatchWithNoise:
    """What chance decides for a batch."""
    return BatchWithNoise(batch, draw(rule, batch.epoch, batch.pair_ids))


def prefetch_noise(
    batches: Iterator[PairBatch], rule: DrawRule, device: torch.device
) -> Iterator[BatchWithNoise]:
    """Batches and their draws where the device can fetch them; for the thread that reads ahead."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    for batch in batches:
        draws = draw(rule, batch.epoch, batch.pair_ids)
        yield BatchWithNoise(pinned(batch, device), pinned(draws, device))


@dataclass(frozen=True, slots=True)
class NoisedBatch:
    """What a denoiser is asked about a batch; winners first, then losers."""

    noisy: Float[Tensor, "image channel height width"]
    timestep: Int[Tensor, " image"]
    condition: Condition
    target: Float[Tensor, "image channel height width"]
    """The right answer."""


def prepare_inputs(noised: BatchWithNoise, components: ModelComponents) -> NoisedBatch:
    """Noise both images of each pair alike."""
    draws, schedule = noised.draws, components.schedule
    latents, condition = encode(noised.batch, components, draws)
    timestep, noise = twice(draws.timestep), twice(draws.noise)  # winner and loser share both
    noisy = schedule.add_noise(latents, noise, timestep)
    return NoisedBatch(noisy, timestep, condition, schedule.get_target(latents, noise, timestep))


def predict(
    unet: Denoiser, inputs: NoisedBatch, dtype: torch.dtype
) -> Float[Tensor, "image channel height width"]:
    """A denoiser's prediction, float32."""
    return run_denoiser(unet, inputs.noisy, inputs.timestep, inputs.condition, dtype)


def step(noised: BatchWithNoise, models: Models, criterion: Criterion) -> StepOutput:
    """One step on this rank's pairs; with `dpo` it is Wallace et al. 2023, Eq. 14.

    Nothing in it waits for the device.
    """
    components = models.components
    noised = noised.on(components.device)
    inputs = prepare_inputs(noised, components)
    predicted = predict(models.policy, inputs, components.dtype)
    policy = denoising_errors(predicted, inputs.target)
    overlap = residual_overlap(predicted, inputs.target)
    with torch.inference_mode():
        predicted = predict(models.reference, inputs, components.dtype)
    reference = denoising_errors(predicted.clone(), inputs.target)  # a copy that autograd may keep
    share = noised.draws.timestep / len(components.schedule.alphas_cumprod)
    return step_output(Compared(policy, reference, overlap, noised.batch.margin), criterion, share)


def step_output(
    compared: Compared, criterion: Criterion, share: Float[Tensor, " pair"]
) -> StepOutput:
    """The loss to differentiate, and what the journal wants to know of each pair."""
    losses, policy = criterion.losses(compared), compared.policy.detached()
    margin = criterion.margin(policy, compared.reference)
    return StepOutput(losses.mean(), losses.detach(), margin, policy, compared.reference, share)


def absent(noisy: Tensor, *_: object, **__: object) -> tuple[Tensor]:
    """In the reference's place where none is asked: computes nothing, and answers NaN."""
    return (torch.full_like(noisy, torch.nan),)


@torch.no_grad()
def encode(
    batch: PairBatch, components: ModelComponents, draws: Draws
) -> tuple[Float[Tensor, "image channel height_8 width_8"], Condition]:
    """Latents and text of a batch: winners first, then losers; both of a pair mirrored or none."""
    images = torch.cat([facing(side, draws.flip) for side in (batch.winner, batch.loser)])
    posterior = torch.cat([draws.posterior[:, 0], draws.posterior[:, 1]])
    cached = images.is_floating_point()
    encode_side = components.sample_posterior if cached else components.encode_images
    latents = encode_side(images, posterior)
    dropped = draws.drop_caption.tolist()
    prompts = ["" if d else text for d, text in zip(dropped, batch.prompts, strict=True)]
    return latents, components.condition(prompts, batch.size)


def facing(side: Images, mirror: Bool[Tensor, " pair"]) -> Tensor:
    """One side's pixels, or moments of latents; mirrored left to right where asked."""
    if not side.is_floating_point():
        return torch.where(mirror.view(-1, 1, 1, 1), side.flip(2), side)
    upright, mirrored = side[:, 0], side[:, -1]  # the same where nothing is ever mirrored
    return torch.where(mirror.view(-1, 1, 1, 1, 1), mirrored, upright)


def twice(tensor: Tensor) -> Tensor:
    """The same for winners and losers, which follow each other."""
    return torch.cat([tensor, tensor])
