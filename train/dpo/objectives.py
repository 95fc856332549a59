"""Chooses the loss and the distribution of timesteps by the settings."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from data.artifacts.atomic import ShardError
from train.config import Objective, TimestepKind, TimestepSpec, TrainSpec
from train.dpo.draws import Bucketed, Importance, LogitNormal, TimestepRule, uniform
from train.dpo.loss import (
    Compared,
    Errors,
    dpo_losses,
    ipo_losses,
    lead,
    linear_dpo_losses,
    mapo_losses,
    margin,
    margin_dpo_losses,
    sdpo_losses,
)


def _reference_free(policy: Errors, reference: Errors) -> Float[Tensor, " pair"]:
    return lead(policy)


@dataclass(frozen=True, slots=True)
class Criterion:
    """An objective with its settings filled in."""

    losses: Callable[[Compared], Float[Tensor, " pair"]]
    """The loss of each pair; their mean is minimized."""
    margin: Callable[[Errors, Errors], Float[Tensor, " pair"]] = margin
    """The logged margin; accuracy is the fraction of pairs for which it is above 0."""
    uses_reference: bool = True
    """Whether the reference model is run at all."""


def make_criterion(
    spec: TrainSpec, votes: Int[np.ndarray, " pair"], num_timesteps: int
) -> Criterion:
    """The objective of a run; `votes` is the lead in votes of each decided pair.

    Raises:
        ShardError: Pairs are to be weighted by vote margins that are all 0.
    """
    objective, beta = spec.objective, spec.beta
    if objective.kind is Objective.margin_dpo:
        return margin_dpo(beta, mean_votes(votes))
    if objective.kind is Objective.ipo:
        return Criterion(lambda pairs: ipo_losses(pairs.policy, pairs.reference, beta))
    if objective.kind is Objective.linear_dpo:
        return Criterion(
            lambda pairs: linear_dpo_losses(pairs.policy, pairs.reference, beta, objective.eta)
        )
    if objective.kind is Objective.sdpo:
        return Criterion(
            lambda pairs: sdpo_losses(
                pairs.policy, pairs.reference, beta, pairs.overlap, objective.mu
            )
        )
    if objective.kind is Objective.mapo:
        own, weight = objective.mapo_beta, objective.winner_weight
        return Criterion(
            lambda pairs: mapo_losses(pairs.policy, num_timesteps, own, weight),
            margin=_reference_free,
            uses_reference=False,
        )
    return dpo(beta)


def dpo(beta: float) -> Criterion:
    """Diffusion-DPO, the default."""
    return Criterion(lambda pairs: dpo_losses(pairs.policy, pairs.reference, beta))


def margin_dpo(beta: float, mean: float) -> Criterion:
    """Diffusion-DPO weighted by the lead in votes, whose mean over the label set is `mean`."""
    return Criterion(
        lambda pairs: margin_dpo_losses(pairs.policy, pairs.reference, beta, pairs.votes, mean)
    )


def mean_votes(votes: Int[np.ndarray, " pair"]) -> float:
    """Mean absolute lead in votes.

    Raises:
        ShardError: It is 0.
    """
    mean = float(np.abs(votes).mean())
    if mean == 0:
        raise ShardError(
            "train.objective.kind=margin_dpo weights pairs by the lead in votes, which is 0 for "
            f"each of the {len(votes)} decided pairs; choose objective=dpo or another vote"
        )
    return mean


def timestep_rule(spec: TimestepSpec) -> TimestepRule:
    """The distribution of timesteps of a run."""
    if spec.kind is TimestepKind.importance:
        return Importance(tuple(spec.weights))
    if spec.kind is TimestepKind.bucketed:
        return Bucketed(spec.buckets)
    if spec.kind is TimestepKind.logit_normal:
        return LogitNormal(spec.mean, spec.std)
    return uniform
