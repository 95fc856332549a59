"""How many prompts a comparison needs, and how small a difference a number of prompts can show.

Pure. Both are about the exact two-sided sign test at 5 % over n prompts that are no tie, by its
normal approximation with continuity correction (Fleiss 1981, one proportion): a share of wins
p = 1/2 + d is found with the given power where

    sqrt(n) (d - 1 / (2 n)) = z_0.975 / 2 + z_power sqrt(p (1 - p))
"""

import math

from scipy.optimize import brentq
from scipy.stats import norm

POWER = 0.8
"""How often a difference of this size is to be found: the usual four times in five."""
FEWEST = 6
"""Five wins of five are not yet 5 %."""
_Z = float(norm.ppf(0.975))


def needed_prompts(share: float, power: float = POWER) -> int | None:
    """Prompts (ties not counted) that find a share of wins other than a half; None for a half."""
    d = abs(share - 0.5)
    if d == 0:
        return None
    plain = (_spread(d, power) / d) ** 2
    corrected = plain / 4 * (1 + math.sqrt(1 + 2 / (plain * d))) ** 2
    return max(FEWEST, math.ceil(corrected))


def detectable(num_prompts: int, power: float = POWER) -> float | None:
    """The smallest share of wins above a half that this many prompts find; None when none is."""
    n = num_prompts
    if n < FEWEST:
        return None
    found: float = brentq(lambda d: math.sqrt(n) * (d - 1 / (2 * n)) - _spread(d, power), 0.0, 0.5)
    return 0.5 + found


def _spread(d: float, power: float) -> float:
    """The right side of the equation."""
    return _Z / 2 + float(norm.ppf(power)) * math.sqrt(0.25 - d * d)
