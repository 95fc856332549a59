"""How many prompts a comparison needs, and how small a difference so many prompts can detect.

Pure. Both are about the exact two-sided sign test at 5 % over n prompts without ties, by its
normal approximation with continuity correction (Fleiss 1981, one proportion): a win fraction
p = 1/2 + d is detected with the given power where

    sqrt(n) (d - 1 / (2 n)) = z_0.975 / 2 + z_power sqrt(p (1 - p))
"""

import math

from scipy.optimize import brentq
from scipy.stats import norm

POWER = 0.8
"""The probability that a difference of this size is detected; 0.8 is customary."""
FEWEST = 6
"""With five prompts even five wins are not significant at 5 %."""
_Z = float(norm.ppf(0.975))


def needed_prompts(win_fraction: float, power: float = POWER) -> int | None:
    """Prompts, not counting ties, that detect a win fraction other than a half; None for a half."""
    d = abs(win_fraction - 0.5)
    if d == 0:
        return None
    plain = (_spread(d, power) / d) ** 2
    corrected = plain / 4 * (1 + math.sqrt(1 + 2 / (plain * d))) ** 2
    return max(FEWEST, math.ceil(corrected))


def detectable(num_prompts: int, power: float = POWER) -> float | None:
    """The smallest win fraction above a half that so many prompts detect; None if there is none."""
    n = num_prompts
    if n < FEWEST:
        return None
    d: float = brentq(lambda d: math.sqrt(n) * (d - 1 / (2 * n)) - _spread(d, power), 0.0, 0.5)
    return 0.5 + d


def _spread(d: float, power: float) -> float:
    """The right side of the equation."""
    return _Z / 2 + float(norm.ppf(power)) * math.sqrt(0.25 - d * d)
