"""From settings to what a step is built of: the objective and the distribution of timesteps."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from data.artifacts.atomic import ShardError
from train.config import Objective, TimestepKind, TimestepSpec, TrainSpec
from train.dpo.draws import Bucketed, Importance, TimestepRule, uniform
from train.dpo.loss import (
    Compared,
    Errors,
    dpo_losses,
    ipo_losses,
    lead,
    mapo_losses,
    margin,
    margin_dpo_losses,
    sdpo_losses,
)
from train.loader.dataset import DecidedPairs


def _reference_free(policy: Errors, reference: Errors) -> Float[Tensor, " pair"]:
    return lead(policy)


@dataclass(frozen=True, slots=True)
class Criterion:
    """An objective with its settings filled in."""

    losses: Callable[[Compared], Float[Tensor, " pair"]]
    """Of each pair; their mean is minimised."""
    margin: Callable[[Errors, Errors], Float[Tensor, " pair"]] = margin
    """What the journal calls margin; accuracy is the share of pairs where it is above 0."""
    asks_reference: bool = True
    """Whether the reference model is run at all."""


def make_criterion(spec: TrainSpec, pairs: DecidedPairs, num_timesteps: int) -> Criterion:
    """The objective of a run.

    Raises:
        ShardError: Pairs are to be weighted by vote margins that are all 0.
    """
    asked, beta = spec.objective, spec.beta
    if asked.kind is Objective.margin_dpo:
        return margin_dpo(beta, mean_votes(pairs))
    if asked.kind is Objective.ipo:
        return Criterion(lambda found: ipo_losses(found.policy, found.reference, beta))
    if asked.kind is Objective.sdpo:
        return Criterion(
            lambda found: sdpo_losses(found.policy, found.reference, beta, found.overlap, asked.mu)
        )
    if asked.kind is Objective.mapo:
        own, weight = asked.mapo_beta, asked.winner_weight
        return Criterion(
            lambda found: mapo_losses(found.policy, num_timesteps, own, weight),
            margin=_reference_free,
            asks_reference=False,
        )
    return dpo(beta)


def dpo(beta: float) -> Criterion:
    """Diffusion-DPO, the default."""
    return Criterion(lambda found: dpo_losses(found.policy, found.reference, beta))


def margin_dpo(beta: float, mean: float) -> Criterion:
    """The same, weighted by vote margin; `mean` is that of the set."""
    return Criterion(
        lambda found: margin_dpo_losses(found.policy, found.reference, beta, found.votes, mean)
    )


def mean_votes(pairs: DecidedPairs) -> float:
    """Mean of the lead in votes, whichever side it is on, over all decided pairs.

    Raises:
        ShardError: It is 0.
    """
    mean = float(np.abs(pairs.table["margin"].to_numpy()).mean())
    if mean == 0:
        raise ShardError(
            "train.objective.kind=margin_dpo weights pairs by the lead in votes, which is 0 for "
            f"each of the {len(pairs)} decided pairs; choose objective=dpo or another vote"
        )
    return mean


def timestep_rule(spec: TimestepSpec) -> TimestepRule:
    """The distribution of timesteps of a run."""
    if spec.kind is TimestepKind.importance:
        return Importance(tuple(spec.weights))
    if spec.kind is TimestepKind.bucketed:
        return Bucketed(spec.buckets)
    return uniform
