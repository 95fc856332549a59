"""Held-out pairs: does what is learned carry over to prompts that were not trained on?

The policy is compared with the base, not with the moving reference: a snapshot would reset that
comparison, and the curve would say nothing about the run as a whole. Timestep and noise of a pair
are the same at every look, so looks differ by the policy alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.artifacts.atomic import ShardError
from train.config import ValidationSpec
from train.distributed.deepspeed_engine import World
from train.dpo.draws import DrawRule, fraction
from train.dpo.loss import Errors, denoising_errors, margin
from train.dpo.step import NoisedBatch, draw_noise, predict, prepare_inputs
from train.loader.dataset import DecidedPairs
from train.loader.loader import PairStream, StreamPlan
from train.models.components import Denoiser, ModelComponents

FIELDS = tuple(
    f"validation_{name}"
    for name in ("accuracy", "margin", "winner_error", "loser_error", "winner_rise", "loser_rise")
)
"""What a look adds to the journal's line."""
NOT_LOOKED: dict[str, float | None] = dict.fromkeys(FIELDS)
"""What it has at other steps."""

Asked = tuple[NoisedBatch, int]
"""A batch, and how many of its pairs count; see `dealt`."""


def split(pairs: DecidedPairs, spec: ValidationSpec) -> DecidedPairs:
    """The pairs to train on, with those held out beside them; no prompt is on both sides.

    Of the held-out pairs the first `spec.pairs` by a hash of their names are kept, in the order of
    their row groups.

    Raises:
        ShardError: Nothing is left on one side.
    """
    if spec.share == 0:
        return pairs
    prompts, names = (pairs.table[name].to_pylist() for name in ("prompt", "pair_id"))
    held = {prompt: fraction(f"held out/{prompt}") < spec.share for prompt in set(prompts)}
    mask = np.array([held[prompt] for prompt in prompts], dtype=bool)
    chosen = np.flatnonzero(mask)
    if len(chosen) in (0, len(pairs)):
        raise ShardError(
            f"train.validation.share={spec.share} holds out {len(chosen)} of {len(pairs)} decided "
            f"pairs ({len(held)} prompts); choose another share, or 0 to train on all"
        )
    first = sorted(chosen, key=lambda index: fraction(f"held out/{names[index]}"))[: spec.pairs]
    in_order = sorted(first, key=lambda index: (pairs.group[index], index))
    kept = pairs.only(np.array(in_order))
    return replace(pairs.only(np.flatnonzero(~mask)), held_out=kept)


def dealt(count: int, micro_batch: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, int]]:
    """A rank's batches of `count` things: indices, and how many of them count; the rest fills.

    Every rank has as many, of the same size, since all ranks must run the model together.
    """
    together = micro_batch * world
    for start in range(0, count, together):
        first = start + rank * micro_batch
        yield np.arange(first, first + micro_batch) % count, min(max(count - first, 0), micro_batch)


@dataclass(frozen=True, slots=True)
class Validation:
    """This rank's held-out pairs, noised and encoded once."""

    spec: ValidationSpec
    asked: list[Asked]
    base: list[Errors]
    """Of the model before training."""
    dtype: torch.dtype

    def due(self, step: int, last: int) -> bool:
        """Whether to look after this many optimizer steps."""
        return step % self.spec.every == 0 or step == last

    def look(self, policy: Denoiser, world: World) -> dict[str, float]:
        """The journal's fields, equal on all ranks; every rank must call it.

        `validation_accuracy` is the share of pairs on which the policy, compared with the base,
        went where the label says (0.5 is chance); errors are the policy's own, and their rise over
        the base's is relative.
        """
        found = [
            counted(after, before, real)
            for after, before, (_, real) in zip(
                errors_of(policy, self.asked, self.dtype), self.base, self.asked, strict=True
            )
        ]
        sums = world.all_reduce(torch.stack(found).sum(0)).tolist()
        pairs, right, gap, winner, loser, base_winner, base_loser = sums
        rises = winner / base_winner - 1, loser / base_loser - 1
        means = right / pairs, gap / pairs, winner / pairs, loser / pairs
        return dict(zip(FIELDS, (*means, *rises), strict=True))


def counted(after: Errors, before: Errors, real: int) -> Float[Tensor, " sum"]:
    """Sums over the first `real` pairs: pairs, right ones (a tie is half), margin, all errors."""
    judged = margin(after, before)
    right = (judged > 0).double() + 0.5 * (judged == 0)
    each = [torch.ones_like(right), right, judged, after.winner, after.loser,
            before.winner, before.loser]  # fmt: skip
    return torch.stack([values[:real].double().sum() for values in each])


@torch.no_grad()
def errors_of(unet: Denoiser, asked: list[Asked], dtype: torch.dtype) -> Iterator[Errors]:
    """A denoiser's errors, batch by batch."""
    for question, _ in asked:
        yield denoising_errors(predict(unet, question, dtype), question.target)


def make_validation(
    spec: ValidationSpec,
    held: PairStream | None,
    plan: StreamPlan,
    components: ModelComponents,
    base: Denoiser,
    rule: DrawRule,
) -> Validation | None:
    """Read and encode the held-out pairs, if any, and see what the base makes of them.

    `plan` is that of the pairs to train on: it deals the held-out ones to ranks and batches.
    """
    if held is None:
        return None
    asked = [
        (
            prepare_inputs(draw_noise(held.pick(indices), rule).on(components.device), components),
            real,
        )
        for indices, real in dealt(len(held.pairs), plan.micro_batch, plan.rank, plan.world)
    ]
    return Validation(spec, asked, list(errors_of(base, asked, components.dtype)), components.dtype)
