"""Validation on held-out pairs: does what is learned generalize to other prompts?

The policy is compared with the base, not with the moving reference: a snapshot would reset that
comparison, and the curve would say nothing about the run as a whole. Timestep and noise of a pair
are the same at every validation, so validations differ by the policy alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.artifacts.atomic import ShardError
from train.config import ValidationSpec
from train.distributed.world import World
from train.dpo.draws import DrawRule, keyed_uniform
from train.dpo.loss import Errors, denoising_errors, margin
from train.dpo.step import NoisedBatch, draw_noise, predict, prepare_inputs
from train.loader.dataset import DecidedPairs
from train.loader.loader import PairStream, StreamPlan
from train.models.components import Denoiser, ModelComponents
from train.trainer.trainer import Callback, Trainer

FIELDS = tuple(
    f"validation_{name}"
    for name in ("accuracy", "margin", "winner_error", "loser_error", "winner_rise", "loser_rise")
)
"""What a validation adds to a step's metrics; null at the other steps."""

CountedBatch = tuple[NoisedBatch, int]
"""A batch, and how many of its pairs count; see `deal_with_filler`."""


def split(pairs: DecidedPairs, spec: ValidationSpec) -> DecidedPairs:
    """Split off the held-out pairs, as `held_out` of the result; no prompt is on both sides.

    Of the held-out pairs the first `spec.pairs` by a hash of their names are kept, in the order of
    their row groups.

    Raises:
        ShardError: Nothing is left on one side.
    """
    if spec.share == 0:
        return pairs
    prompts, names = (pairs.table[name].to_pylist() for name in ("prompt", "pair_id"))
    is_held_out = {
        prompt: keyed_uniform(f"held out/{prompt}") < spec.share for prompt in set(prompts)
    }
    mask = np.array([is_held_out[prompt] for prompt in prompts], dtype=bool)
    chosen = np.flatnonzero(mask)
    if len(chosen) in (0, len(pairs)):
        raise ShardError(
            f"train.validation.share={spec.share} holds out {len(chosen)} of {len(pairs)} decided "
            f"pairs ({len(is_held_out)} prompts); choose another share, or 0 to train on all"
        )
    first = sorted(chosen, key=lambda index: keyed_uniform(f"held out/{names[index]}"))
    in_order = sorted(first[: spec.pairs], key=lambda index: (pairs.group[index], index))
    kept = pairs.only(np.array(in_order))
    return replace(pairs.only(np.flatnonzero(~mask)), held_out=kept)


def deal_with_filler(
    count: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Deal `count` things to a rank in batches: indices, and how many of them count.

    The others are filler: every rank gets as many batches of the same size as the others, because
    all ranks must run the model together.
    """
    together = micro_batch * world_size
    for start in range(0, count, together):
        first = start + rank * micro_batch
        yield np.arange(first, first + micro_batch) % count, min(max(count - first, 0), micro_batch)


@dataclass(frozen=True, slots=True)
class Validation(Callback):
    """This rank's held-out pairs, noised and encoded once."""

    spec: ValidationSpec
    batches: list[CountedBatch]
    base: list[Errors]
    """The errors of the model before training, batch by batch."""
    components: ModelComponents

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Validate if it is time, and add the results to the step's metrics."""
        step = trainer.state.step
        if step % self.spec.every == 0 or step == trainer.run.train.steps:
            line |= self.evaluate(trainer.policy, trainer.world)
        else:
            line |= dict.fromkeys(FIELDS)

    def evaluate(self, policy: Denoiser, world: World) -> dict[str, float]:
        """Return the values of `FIELDS`, equal on all ranks; every rank must call it.

        `validation_accuracy` is the fraction of pairs on which the policy, compared with the base,
        went where the label says (0.5 is chance); errors are the policy's own, and their rise over
        the base's is relative.
        """
        errors = errors_of(policy, self.batches, self.components)
        each = [
            sums_over(after, before, real)
            for after, before, (_, real) in zip(errors, self.base, self.batches, strict=True)
        ]
        sums = world.all_reduce(torch.stack(each).sum(0)).tolist()
        pairs, right, gap, winner, loser, base_winner, base_loser = sums
        rises = winner / base_winner - 1, loser / base_loser - 1
        means = right / pairs, gap / pairs, winner / pairs, loser / pairs
        return dict(zip(FIELDS, (*means, *rises), strict=True))


def is_evaluated(line: dict[str, Any]) -> bool:
    """Whether a step's metrics include a validation."""
    return line.get(FIELDS[0]) is not None


def sums_over(after: Errors, before: Errors, real: int) -> Float[Tensor, " sum"]:
    """Sums over the first `real` pairs: pairs, right ones (a tie is half), margin, all errors."""
    judged = margin(after, before)
    right = (judged > 0).double() + 0.5 * (judged == 0)
    each = [torch.ones_like(right), right, judged, after.winner, after.loser,
            before.winner, before.loser]  # fmt: skip
    return torch.stack([values[:real].double().sum() for values in each])


@torch.no_grad()
def errors_of(
    denoiser: Denoiser, batches: list[CountedBatch], components: ModelComponents
) -> Iterator[Errors]:
    """Yield a denoiser's errors, batch by batch."""
    for inputs, _ in batches:
        yield denoising_errors(predict(denoiser, inputs, components), inputs.target)


def make_validation(
    spec: ValidationSpec,
    held_out: PairStream | None,
    plan: StreamPlan,
    components: ModelComponents,
    base: Denoiser,
    draw_rule: DrawRule,
) -> Validation | None:
    """Read and encode the held-out pairs, if any, and compute the base's errors on them.

    `plan` is that of the training pairs: it also deals the held-out ones to ranks and batches.
    """
    if held_out is None:
        return None
    batches: list[CountedBatch] = []
    for size in np.unique(held_out.size):
        alike = np.flatnonzero(held_out.size == size)
        dealt = deal_with_filler(len(alike), plan.micro_batch, plan.rank, plan.world_size)
        for indices, real in dealt:
            noised = draw_noise(held_out.pick(alike[indices]), draw_rule).on(components.device)
            batches.append((prepare_inputs(noised, components), real))
    return Validation(spec, batches, list(errors_of(base, batches, components)), components)
