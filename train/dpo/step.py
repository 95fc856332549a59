"""One step in the paper's order."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from data.models.family import Condition, PromptEmbeds
from data.models.text_encoders import EncodePrompts, encode_distinct
from train.dpo.draws import DrawRule, Draws, draw
from train.dpo.loss import Compared, Errors, denoising_errors, residual_overlap
from train.dpo.objectives import Criterion
from train.loader.device_copy import copy_to, pin
from train.loader.image_source import Images
from train.loader.loader import PairBatch
from train.models.components import Denoiser, ModelComponents


@dataclass(frozen=True, slots=True)
class Models:
    """The three models of a step."""

    components: ModelComponents
    policy: Denoiser
    reference: Denoiser
    """`absent` under an objective without a reference."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a forward pass; all but `loss` is detached and per pair."""

    loss: Float[Tensor, ""]
    """Mean over the pairs; its gradient trains the policy."""
    losses: Float[Tensor, " pair"]
    margin: Float[Tensor, " pair"]
    """The objective's; above 0 if the policy agrees with the label."""
    policy: Errors
    reference: Errors
    """NaN under an objective without a reference."""
    timestep: Float[Tensor, " pair"]
    """As a fraction of the schedule, in [0, 1), before any shift."""


@dataclass(frozen=True, slots=True)
class BatchWithNoise:
    """A batch with its random choices."""

    batch: PairBatch
    draws: Draws
    text: PromptEmbeds | None = None
    """The encoded prompts, if they were read."""

    def on(self, device: torch.device) -> "BatchWithNoise":
        """Copy to the device; sizes and dropped captions stay, because the host needs them."""
        batch = copy_to(device, self.batch, stay=("size",))
        draws = copy_to(device, self.draws, stay=("drop_caption",))
        text = None if self.text is None else copy_to(device, self.text)
        return BatchWithNoise(batch, draws, text)


def draws_of(batch: PairBatch, draw_rule: DrawRule) -> Draws:
    """The random choices of a batch."""
    return draw(draw_rule, batch.epochs, batch.pair_ids, batch.cut)


def draw_noise(batch: PairBatch, draw_rule: DrawRule) -> BatchWithNoise:
    """Draw the random choices of a batch."""
    return BatchWithNoise(batch, draws_of(batch, draw_rule))


def prefetch_noise(
    batches: Iterator[PairBatch],
    draw_rule: DrawRule,
    device: torch.device,
    texts: EncodePrompts | None = None,
) -> Iterator[BatchWithNoise]:
    """Yield batches with noise where the device can fetch them; runs in the prefetch thread.

    `texts` reads encoded prompts; without it they are encoded in the step.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    for batch in batches:
        draws = draws_of(batch, draw_rule)
        text = None
        if texts is not None:
            text = pin(encode_distinct(texts, captions(batch, draws)), device)
        yield BatchWithNoise(pin(batch, device), pin(draws, device), text)


@dataclass(frozen=True, slots=True)
class NoisedBatch:
    """The inputs and the target of a denoiser; winners first, then losers."""

    noisy: Float[Tensor, "image channel height width"]
    timestep: Shaped[Tensor, " image"]
    """As the denoiser is told."""
    condition: Condition
    target: Float[Tensor, "image channel height width"]
    """What the denoiser should predict."""


def prepare_inputs(noised: BatchWithNoise, components: ModelComponents) -> NoisedBatch:
    """Add the same noise to both images of each pair."""
    draws, schedule = noised.draws, components.schedule
    latents, condition = encode(noised.batch, components, draws, noised.text)
    timestep, noise = twice(draws.timestep), twice(draws.noise)  # winner and loser share both
    noisy = schedule.add_noise(latents, noise, timestep)
    target = schedule.get_target(latents, noise, timestep)
    return NoisedBatch(noisy, schedule.denoiser_timestep(timestep), condition, target)


def predict(
    denoiser: Denoiser, inputs: NoisedBatch, components: ModelComponents
) -> Float[Tensor, "image channel height width"]:
    """Return a denoiser's prediction in float32."""
    return components.predict(denoiser, inputs.noisy, inputs.timestep, inputs.condition)


def step(noised: BatchWithNoise, models: Models, criterion: Criterion) -> StepOutput:
    """One step on this rank's pairs; with `dpo` it is Wallace et al. 2023, Eq. 14.

    Nothing in it waits for the device.
    """
    components = models.components
    noised = noised.on(components.device)
    inputs = prepare_inputs(noised, components)
    predicted = predict(models.policy, inputs, components)
    policy = denoising_errors(predicted, inputs.target)
    overlap = residual_overlap(predicted, inputs.target)
    with torch.inference_mode():
        predicted = predict(models.reference, inputs, components)
    reference = denoising_errors(predicted.clone(), inputs.target)  # a copy that autograd may keep
    fraction = noised.draws.timestep / components.num_timesteps
    batch = noised.batch
    compared = Compared(policy, reference, overlap, batch.margin, batch.vote_fraction)
    return step_output(compared, criterion, fraction)


def step_output(
    compared: Compared, criterion: Criterion, timestep: Float[Tensor, " pair"]
) -> StepOutput:
    """Compute the loss to differentiate, and what is logged of each pair."""
    losses, policy = criterion.losses(compared), compared.policy.detached()
    margin = criterion.margin(policy, compared.reference)
    return StepOutput(losses.mean(), losses.detach(), margin, policy, compared.reference, timestep)


def absent(noisy: Tensor, *_: object, **__: object) -> tuple[Tensor]:
    """Stand in for the reference where there is none: computes nothing and returns NaN."""
    return (torch.full_like(noisy, torch.nan),)


@torch.no_grad()
def encode(
    batch: PairBatch,
    components: ModelComponents,
    draws: Draws,
    text: PromptEmbeds | None = None,
) -> tuple[Float[Tensor, "image channel height_8 width_8"], Condition]:
    """Encode a batch, winners first, then losers; both images of a pair are mirrored or none.

    `text` are the encoded prompts, where they were read.
    """
    images = torch.cat([facing(side, draws.flip) for side in (batch.winner, batch.loser)])
    posterior = torch.cat([draws.posterior[:, 0], draws.posterior[:, 1]])
    cached = images.is_floating_point()
    encode_side = components.sample_posterior if cached else components.encode_images
    latents = encode_side(images, posterior)
    return latents, components.condition(captions(batch, draws), batch.size, batch.cut, text)


def captions(batch: PairBatch, draws: Draws) -> list[str]:
    """The prompts of a batch, empty where the caption is dropped."""
    dropped = draws.drop_caption.tolist()
    return ["" if d else text for d, text in zip(dropped, batch.prompts, strict=True)]


def facing(side: Images, mirror: Bool[Tensor, " pair"]) -> Tensor:
    """One side's pixels, or moments of latents; mirrored left to right where `mirror` is true."""
    if not side.is_floating_point():
        return torch.where(mirror.view(-1, 1, 1, 1), side.flip(2), side)
    upright, mirrored = side[:, 0], side[:, -1]  # the same if no mirrored ones were read
    return torch.where(mirror.view(-1, 1, 1, 1, 1), mirrored, upright)


def twice(tensor: Tensor) -> Tensor:
    """Repeat for winners, then losers."""
    return torch.cat([tensor, tensor])
