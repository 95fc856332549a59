"""A mean over prompts and training seeds, with an interval that counts both. Pure.

Every model of every training seed has an image of every prompt, so outcomes are a matrix of prompts
and seeds, whose rows and columns both vary:

    y_ij = mu + a_i + b_j + e_ij

An interval over prompts alone is about these trainings, not about others.
"""

import numpy as np
from jaxtyping import Float
from scipy.stats import t

from evaluate.statistics.bootstrap import CONFIDENCE, Estimate

Outcomes = Float[np.ndarray, "prompt seed"]
TAIL = (1 - CONFIDENCE) / 2


def interval(outcomes: Outcomes) -> Estimate:
    """The mean of the matrix with a t interval; prompts with a NaN are left out.

    With n prompts, m seeds and the mean squares A, B, E of prompts, seeds and residual, the
    variance of the mean is estimated by (A + B - E) / (n m), at least A / (n m), and its degrees of
    freedom as Satterthwaite (1946) does. With few seeds that is what covers: see
    `benchmarks.coverage`. With one seed the interval is over prompts alone.
    """
    whole = outcomes[~np.isnan(outcomes).any(1)]
    (n, m), mean = whole.shape, whole.mean()
    rows, columns = whole.mean(1) - mean, whole.mean(0) - mean
    of_prompts = m * np.square(rows).sum() / (n - 1)
    of_seeds, residual = 0.0, 0.0
    if m > 1:
        of_seeds = n * np.square(columns).sum() / (m - 1)
        rest = whole - mean - rows[:, None] - columns
        residual = np.square(rest).sum() / ((n - 1) * (m - 1))
    variance = max(of_prompts + of_seeds - residual, of_prompts)
    if variance == 0:
        return Estimate(float(mean), float(mean), float(mean))
    parts = of_prompts**2 / (n - 1) + (of_seeds**2 + residual**2 / (n - 1)) / max(m - 1, 1)
    half = t.ppf(1 - TAIL, variance**2 / parts) * np.sqrt(variance / (n * m))
    return Estimate(float(mean), float(mean - half), float(mean + half))


def two_way_bootstrap(outcomes: Outcomes, *, resamples: int, seed: int) -> Estimate:
    """The mean with percentiles over resampled rows and, independently, columns (Owen 2007).

    With five seeds it covers too little where trainings differ, and too much where they do not.
    """
    rng, (n, m) = np.random.default_rng(seed), outcomes.shape
    rows = rng.multinomial(n, np.full(n, 1 / n), resamples)
    columns = rng.multinomial(m, np.full(m, 1 / m), resamples)
    means = np.einsum("rn,nm,rm->r", rows, outcomes, columns, optimize=True) / (n * m)
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    return Estimate(float(outcomes.mean()), float(low), float(high))
