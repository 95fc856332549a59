"""How many prompts a comparison needs, against the exact power of the sign test."""

import numpy as np
import pytest
from scipy.stats import binom

from evaluate.statistics.power import detectable, needed_prompts


def exact_power(num_prompts, fraction):
    """How often the exact two-sided 5 % sign test detects this fraction of wins."""
    limit = int(binom.ppf(0.025, num_prompts, 0.5))
    while binom.cdf(limit, num_prompts, 0.5) > 0.025:
        limit -= 1
    return binom.cdf(limit, num_prompts, fraction) + binom.sf(
        num_prompts - limit - 1, num_prompts, fraction
    )


@pytest.mark.parametrize("fraction", [0.75, 0.7, 0.6, 0.55, 0.52])
def test_the_needed_prompts_detect_the_difference(fraction):
    """The exact test's power jumps from n to n + 1; over a dozen n it is 0.8 on average."""
    needed = needed_prompts(fraction)
    power = np.mean([exact_power(needed + extra, fraction) for extra in range(-6, 7)])
    assert power == pytest.approx(0.8, abs=0.03)
    assert needed_prompts(1 - fraction) == needed
    assert detectable(needed) == pytest.approx(fraction, abs=2e-3)


def test_no_difference_needs_no_prompts_and_few_prompts_detect_nothing():
    assert needed_prompts(0.5) is None
    assert needed_prompts(1.0) == 6
    assert detectable(5) is None
    assert detectable(6) < 1
