"""Chooses the loss and the distribution of timesteps by the settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from data.artifacts.atomic import ShardError
from train.config import Objective, ObjectiveSpec, TimestepKind, TimestepSpec
from train.dpo.draws import Bucketed, Importance, LogitNormal, TimestepRule, uniform
from train.dpo.loss import (
    Compared,
    Confidence,
    Errors,
    anchor_losses,
    dpo_losses,
    ipo_losses,
    lead,
    linear_dpo_losses,
    mapo_losses,
    margin,
    margin_dpo_losses,
    sdpo_losses,
    vote_confidence,
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
    objective: ObjectiveSpec, votes: Int[np.ndarray, " pair"], num_timesteps: int
) -> Callable[[float], Criterion]:
    """The objective of a run at any beta; `votes` is each decided pair's lead in votes.

    Raises:
        ShardError: Pairs are to be weighted by vote margins that are all 0.
    """
    mean = mean_votes(votes) if objective.kind is Objective.margin_dpo else 1.0

    def criterion(beta: float) -> Criterion:
        preference = _preference(objective, beta, mean, num_timesteps)
        if not objective.anchor:
            return preference
        return anchored(preference, objective.anchor * winner_slope(objective, beta))

    return criterion


def _preference(
    objective: ObjectiveSpec, beta: float, mean: float, num_timesteps: int
) -> Criterion:
    """The objective without an anchor; `mean` is the mean absolute lead in votes."""
    p = confidence(objective)
    if objective.kind is Objective.margin_dpo:
        return margin_dpo(beta, mean, p)
    if objective.kind is Objective.ipo:
        return Criterion(lambda pairs: ipo_losses(pairs.policy, pairs.reference, beta))
    if objective.kind is Objective.linear_dpo:
        return Criterion(
            lambda pairs: linear_dpo_losses(pairs.policy, pairs.reference, beta, objective.eta)
        )
    if objective.kind is Objective.sdpo:
        return Criterion(
            lambda pairs: sdpo_losses(
                pairs.policy, pairs.reference, beta, pairs.overlap, objective.mu, p(pairs)
            )
        )
    if objective.kind is Objective.mapo:
        own, weight = objective.mapo_beta, objective.winner_weight
        return Criterion(
            lambda pairs: mapo_losses(pairs.policy, num_timesteps, own, weight),
            margin=_reference_free,
            uses_reference=False,
        )
    return dpo(beta, p)


def certain(pairs: Compared) -> Confidence:
    """Every label is right."""
    return 1.0


def confidence(objective: ObjectiveSpec) -> Callable[[Compared], Confidence]:
    """How likely labels are right, by the settings of label smoothing."""
    if objective.vote_smoothing:
        return lambda pairs: vote_confidence(pairs.vote_fraction)
    if objective.smoothing:
        return lambda pairs: 1 - objective.smoothing
    return certain


def anchored(criterion: Criterion, weight: float) -> Criterion:
    """An objective with `weight` times the winners' own error added."""
    return replace(
        criterion,
        losses=lambda pairs: (
            criterion.losses(pairs) + anchor_losses(pairs.policy, pairs.reference, weight)
        ),
    )


def winner_slope(objective: ObjectiveSpec, beta: float) -> float:
    """The slope of an objective in e_w per unit of its factor: the unit of `anchor`.

    DPO's slope is beta / 2 times sigmoid(-u), IPO's beta / 2 times 1 - 2 u, Linear-DPO's is w.
    """
    return 1.0 if objective.kind is Objective.linear_dpo else beta / 2


def dpo(beta: float, p: Callable[[Compared], Confidence] = certain) -> Criterion:
    """Diffusion-DPO, the default."""
    return Criterion(lambda pairs: dpo_losses(pairs.policy, pairs.reference, beta, p(pairs)))


def margin_dpo(
    beta: float, mean: float, p: Callable[[Compared], Confidence] = certain
) -> Criterion:
    """Diffusion-DPO weighted by the lead in votes, whose mean over the label set is `mean`."""
    return Criterion(
        lambda pairs: margin_dpo_losses(
            pairs.policy, pairs.reference, beta, pairs.votes, mean, p(pairs)
        )
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
