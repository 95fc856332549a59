"""Settings of what is learned: the objective, the reference and the timesteps."""

import math
from dataclasses import dataclass, field
from enum import Enum


class Refresh(Enum):
    """How the reference model follows the policy."""

    frozen = "frozen"
    """Never: plain Diffusion-DPO."""
    snapshot = "snapshot"
    """A copy of the policy every K optimizer steps: the paper's dynamic reference."""
    ema = "ema"
    """Moved by `alpha` towards the policy every K optimizer steps (TR-DPO)."""


@dataclass(kw_only=True, slots=True)
class ReferenceSpec:
    """When and how the reference is refreshed."""

    refresh: Refresh = Refresh.snapshot
    """The rule."""
    every: int = 50
    """K: optimizer steps between two refreshes."""
    alpha: float = 1.0
    """For `ema`: fraction of the policy in a refreshed reference, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"train.reference.alpha={self.alpha}; it must be in (0, 1]")


class Objective(Enum):
    """What training minimises; the equations are in `train/dpo/loss.py`."""

    dpo = "dpo"
    """Diffusion-DPO (Wallace et al. 2023)."""
    margin_dpo = "margin_dpo"
    """Diffusion-DPO in which a pair weighs as much as its winner's lead in votes."""
    ipo = "ipo"
    """Identity preference optimization (Azar et al. 2023): a margin to reach, not to exceed."""
    sdpo = "sdpo"
    """DPO with the winner-preserving safeguard (Diffusion-SDPO, Fu et al. 2025)."""
    linear_dpo = "linear_dpo"
    """The errors' difference, weighted by a clamped linear function of the margin (Linear-DPO)."""
    mapo = "mapo"
    """Reference-free baseline (Hong et al. 2024)."""


@dataclass(kw_only=True, slots=True)
class ObjectiveSpec:
    """The objective; its strength, for all but `mapo`, is `train.beta`."""

    kind: Objective = Objective.dpo
    """The objective."""
    mu: float = 0.9
    """For `sdpo`: fraction of the winner's progress that the loser may not take away, in [0, 1].
    Published: 0.9 for SD1.5, 0.6 for SDXL. At 1 losers that pull against winners are left alone."""
    eta: float = 0.001
    """For `linear_dpo`: least weight of a pair, in [0, 0.5]; the greatest is 1 - eta. Published:
    0.001 for SD1.5, 0 for SDXL. At 0 a pair that the policy has learned is left alone."""
    mapo_beta: float = 0.1
    """For `mapo`: weight of the preference against the winner's own error; the published one."""
    winner_weight: float = 1.0
    """For `mapo`: weight of the winner's own error (the supervised part); 0 leaves it out."""
    anchor: float = 0.0
    """For all but `mapo`: pull towards lower errors of winners (a supervised part), whatever the
    margin, as a multiple of the objective's own factor: DPO's is 1/2 where policy and reference
    agree and falls to 0 as pairs are learned, so that at 0.25 winners weigh one and a half times
    as much as losers at first. Code that adds k times the winners' mean error to Diffusion-DPO has
    an anchor of 2 k / beta. 0 leaves it out."""
    smoothing: float = 0.0
    """For `dpo`, `margin_dpo` and `sdpo`: probability that a label is wrong, in [0, 0.5) (label
    smoothing, cDPO). Pairs are then pulled back beyond the margin that fits it; 0 trusts labels."""
    vote_smoothing: bool = False
    """For the same, in place of `smoothing`: takes it from the votes, as the loser's fraction of
    those cast. A label of 3 to 1 says less than one of 4 to 0, and even votes say nothing. Labels
    without votes are trusted; those that overruled the votes count as even."""

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise ValueError(f"train.objective.mu={self.mu}; it must be in [0, 1]")
        if not 0 <= self.eta <= 0.5:
            raise ValueError(f"train.objective.eta={self.eta}; it must be in [0, 0.5]")
        if not (self.mapo_beta > 0 and math.isfinite(self.mapo_beta)):
            raise ValueError(f"train.objective.mapo_beta={self.mapo_beta}; it must be above 0")
        if not (self.winner_weight >= 0 and math.isfinite(self.winner_weight)):
            raise ValueError(
                f"train.objective.winner_weight={self.winner_weight}; it must not be negative"
            )
        self._check_anchor()
        self._check_smoothing()

    def _check_anchor(self) -> None:
        if not (self.anchor >= 0 and math.isfinite(self.anchor)):
            raise ValueError(f"train.objective.anchor={self.anchor}; it must not be negative")
        if self.anchor and self.kind is Objective.mapo:
            raise ValueError(
                f"train.objective.anchor={self.anchor:g} with train.objective.kind=mapo, which has "
                "a supervised part of its own; set train.objective.winner_weight instead"
            )

    def _check_smoothing(self) -> None:
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(
                f"train.objective.smoothing={self.smoothing}; it must be in [0, 0.5): at 0.5 "
                "labels would say nothing"
            )
        if self.smoothing and self.vote_smoothing:
            raise ValueError(
                f"train.objective.smoothing={self.smoothing:g} and vote_smoothing=true both say "
                "how likely a label is wrong; leave one of them out"
            )
        kinds = (Objective.dpo, Objective.margin_dpo, Objective.sdpo)
        if (self.smoothing or self.vote_smoothing) and self.kind not in kinds:
            name = "vote_smoothing=true" if self.vote_smoothing else f"smoothing={self.smoothing:g}"
            raise ValueError(
                f"train.objective.{name} has no meaning for train.objective.kind="
                f"{self.kind.value}; choose objective=dpo, margin_dpo or sdpo, or leave it out"
            )


AUTO = "auto"
"""The value of `train.beta` that leaves beta to the run."""
LOGISTIC = (Objective.dpo, Objective.margin_dpo, Objective.sdpo)
"""Objectives whose gradient has the factor sigmoid(-u)."""


@dataclass(kw_only=True, slots=True)
class AutoBetaSpec:
    """How `train.beta=auto` chooses beta; the equations are in `train/dpo/auto_beta.py`."""

    target: float = 0.4
    """Mean gradient factor sigmoid(-u) to keep, between 0 and 0.5: 0.5 is where policy and
    reference agree, and none is reached below 1 - accuracy. A lower target has a larger beta."""
    start: float = 5000.0
    """Beta until the warm-up of the learning rate is over."""
    range: float = 10.0
    """Beta stays between start / range and start x range; above 1."""
    window: int = 10
    """Optimizer steps over which the factor is averaged; the larger, the slower beta follows."""

    def __post_init__(self) -> None:
        if not 0 < self.target < 0.5:
            raise ValueError(
                f"train.auto_beta.target={self.target}; it must be between 0 and 0.5, the factor "
                "where policy and reference agree"
            )
        if not (self.start > 0 and math.isfinite(self.start)):
            raise ValueError(f"train.auto_beta.start={self.start}; it must be above 0")
        if not (self.range > 1 and math.isfinite(self.range)):
            raise ValueError(f"train.auto_beta.range={self.range}; it must be above 1")
        if self.window < 1:
            raise ValueError(f"train.auto_beta.window={self.window}; it must be at least 1")

    def check_objective(self, objective: ObjectiveSpec) -> None:
        """Refuse an objective without this factor, or with one that the target cannot have.

        Raises:
            ValueError: Says which objectives have it, or which targets.
        """
        if objective.kind not in LOGISTIC:
            raise ValueError(
                f"train.beta=auto with train.objective.kind={objective.kind.value}, whose gradient "
                "has no factor sigmoid(-u); choose objective=dpo, margin_dpo or sdpo, or set "
                "train.beta to a number"
            )
        if self.target <= objective.smoothing:
            raise ValueError(
                f"train.auto_beta.target={self.target:g} is not above train.objective.smoothing="
                f"{objective.smoothing:g}, to which smoothed labels pull the factor whatever beta "
                "is; raise the target, or lower the smoothing"
            )


class TimestepKind(Enum):
    """How a pair's timestep is drawn."""

    uniform = "uniform"
    """Every timestep is equally likely."""
    importance = "importance"
    """Some parts of the schedule more often than others."""
    bucketed = "bucketed"
    """Every timestep is equally likely, and each pair cycles through the schedule over epochs."""
    logit_normal = "logit_normal"
    """The middle more often than the ends: the logit of the timestep, as a fraction of the
    schedule, is normally distributed (Esser et al. 2024, section 3.1)."""


@dataclass(kw_only=True, slots=True)
class TimestepSpec:
    """The distribution of timesteps; whatever it is, a pair's depends on (seed, epoch, pair)."""

    kind: TimestepKind = TimestepKind.uniform
    """The rule."""
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 2.0, 3.0, 3.0])
    """For `importance`: how often each of as many equal parts of the schedule is drawn, from least
    to most noise, in any unit. The loss is not divided by it: what is drawn more counts more."""
    buckets: int = 10
    """For `bucketed`: equal parts of the schedule; in as many epochs a pair visits each once."""
    mean: float = 0.0
    """For `logit_normal`: mean of the logit; above 0 there is more noise."""
    std: float = 1.0
    """For `logit_normal`: standard deviation of the logit, above 0."""
    shift: float | None = None
    """For flow-matching models: s in sigma = s u / (1 + (s - 1) u), with u the timestep as a
    fraction of the schedule; above 1 there is more noise. Null takes what diffusers' training
    scripts do: the shift of the model's scheduler (3 for SD3.5), and none where that depends on the
    image's size (FLUX.1 dev)."""

    def __post_init__(self) -> None:
        good = all(
            isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0
            for weight in self.weights
        )
        if not (self.weights and good and sum(self.weights) > 0):
            raise ValueError(
                f"train.timesteps.weights={self.weights}; give at least one number, "
                "none negative and not all 0"
            )
        if self.buckets < 1:
            raise ValueError(f"train.timesteps.buckets={self.buckets}; it must be at least 1")
        self._check_logit_normal()
        if self.shift is not None and not (self.shift > 0 and math.isfinite(self.shift)):
            raise ValueError(f"train.timesteps.shift={self.shift}; it must be above 0, or null")

    def _check_logit_normal(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"train.timesteps.mean={self.mean}; it must be a number")
        if not (self.std > 0 and math.isfinite(self.std)):
            raise ValueError(f"train.timesteps.std={self.std}; it must be above 0")
        if self.kind is not TimestepKind.logit_normal and (self.mean, self.std) != (0, 1):
            raise ValueError(
                f"train.timesteps.mean={self.mean:g} and std={self.std:g} have no meaning for "
                f"train.timesteps.kind={self.kind.value}; set train.timesteps.kind=logit_normal, "
                "or leave them out"
            )
