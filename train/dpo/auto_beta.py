"""`train.beta=auto`: beta that keeps the mean gradient factor of DPO near a target. Pure.

The factor of a pair is sigmoid(-u), u = beta m / 2 being its logit (`train/dpo/loss.py`): what is
left of its gradient, 1/2 where policy and reference agree and 0 where the pair is learned for good.
A large beta stops early; a small one goes far from the reference. Which beta is which depends on
the size of the margins m: on the model, its latents, the learning rate and the number of steps. The
factor does not, so a target for it carries over from one model to the next.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.config import AutoBetaSpec

STEEPEST = 0.224
"""The largest value of u sigmoid(u) sigmoid(-u), at u = 1.54: by how much the factor falls, at
most, as the logarithm of beta grows by 1."""


@dataclass(frozen=True, slots=True)
class AutoBeta:
    """Where the control of beta stands: all that a resumed run needs of it."""

    beta: float
    """That of the next step."""
    factor: float = 0.5
    """The moving average of the mean gradient factor; 1/2 before the first step, as policy and
    reference agree."""


def adjusted(
    before: AutoBeta, factor: float, spec: AutoBetaSpec, *, warming_up: bool = False
) -> AutoBeta:
    """Beta after a step whose mean gradient factor was `factor`, in [0, 1].

    With n the window, F the average, F* the target and b_0 the start:

        F  <-  F + (factor - F) / n
        b  <-  b exp(k (F - F*)), kept in [b_0 / range, b_0 range],   k = 1 / (2 n STEEPEST)

    Pairs that are learned too fast (F < F*) lower beta, and the reverse. This is integral control
    of log b behind a lag of n steps. Its damping is 1 / (2 sqrt(k n s)), s being the slope of F in
    -log b: at least 1/sqrt(2), as s is at most STEEPEST, so that for given margins beta settles
    without swinging. During the warm-up of the learning rate the policy has hardly moved, and F
    near 1/2 says nothing of beta: it stays.

    Ours; that a trainer may aim at a factor is due to SimpleTuner, and Wu et al. 2024 (beta-DPO,
    arXiv 2407.08639) move beta with a batch's mean margin.
    """
    average = before.factor + (factor - before.factor) / spec.window
    if warming_up:
        return AutoBeta(before.beta, average)
    gain = 1 / (2 * spec.window * STEEPEST)
    beta = before.beta * math.exp(gain * (average - spec.target))
    least, most = limits(spec)
    return AutoBeta(min(max(beta, least), most), average)


def limits(spec: AutoBetaSpec) -> tuple[float, float]:
    """The least and the greatest beta."""
    return spec.start / spec.range, spec.start * spec.range


def mean_factor(margins: Sequence[float], beta: float) -> float:
    """The mean of sigmoid(-beta m / 2) over pairs, whose order does not matter to the last bit.

    NaN where a margin is. It falls from 1/2 at beta 0 towards the fraction of pairs with m < 0 (and
    half of those with m = 0) as beta grows: no beta has a factor below 1 - accuracy.
    """
    return math.fsum((1 - math.tanh(beta * m / 4)) / 2 for m in margins) / len(margins)
