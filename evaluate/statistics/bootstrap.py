"""Uncertainty of means over prompts: paired bootstrap, sign test, Holm's adjustment. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest

CONFIDENCE = 0.95
CHUNK = 500
"""How many resamples' weights are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PerPrompt:
    """Values summed within each prompt, so that whole prompts can be resampled."""

    total: Float[np.ndarray, " prompt"]
    number: Float[np.ndarray, " prompt"]

    @property
    def means(self) -> Float[np.ndarray, " prompt"]:
        """Each prompt's mean; NaN for a prompt without values."""
        return ratio(self.total, self.number)


def per_prompt(values: Float[np.ndarray, " pair"], prompt: Int[np.ndarray, " pair"]) -> PerPrompt:
    """Sum and number of each prompt's values without NaN; prompts are numbered from 0."""
    known, size = ~np.isnan(values), int(prompt.max()) + 1
    total = np.bincount(prompt[known], values[known], minlength=size)
    number = np.bincount(prompt[known], minlength=size)
    # Without a single value, bincount returns integers
    return PerPrompt(total.astype(float), number.astype(float))


def ratio(
    total: Float[np.ndarray, "*shape"], number: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Means from sums and numbers; NaN where the number is 0."""
    means: np.ndarray = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
    return means


class Bootstrap:
    """Prompts resampled with replacement, the same ones for every column (Efron 1979)."""

    def __init__(self, columns: Mapping[str, PerPrompt], *, resamples: int, seed: int) -> None:
        self.columns = dict(columns)
        sums = np.stack([part for c in columns.values() for part in (c.total, c.number)], axis=1)
        totals = resampled(sums, resamples, seed)
        means = ratio(totals[:, 0::2], totals[:, 1::2])
        self.spread = dict(zip(columns, means.T, strict=True))

    def mean(self, *names: str, is_rate: bool) -> Estimate:
        """Mean over image pairs, averaged over the named columns, with its interval.

        For a rate of exactly 0 or 1 all resamples are equal; one end of the interval is then the
        exact binomial limit (Clopper and Pearson 1934), so that a few prompts prove little.
        """
        columns = [self.columns[name] for name in names]
        value = np.mean([c.total.sum() / c.number.sum() for c in columns])
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(
            np.mean([self.spread[name] for name in names], axis=0), [tail, 1 - tail]
        )
        num_prompts = min(int((c.number > 0).sum()) for c in columns)
        if is_rate and low == high == 1:
            low = tail ** (1 / num_prompts)
        elif is_rate and low == high == 0:
            high = 1 - tail ** (1 / num_prompts)
        return Estimate(float(value), float(low), float(high))


def resampled(
    sums: Float[np.ndarray, "prompt column"], resamples: int, seed: int
) -> Float[np.ndarray, "resample column"]:
    """Column sums over resamples of the prompts, each as large as the original."""
    rng, size = np.random.default_rng(seed), len(sums)
    parts = []
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        drawn = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        parts.append(times @ sums)
    return np.concatenate(parts)


def sign_test(outcomes: Float[np.ndarray, " prompt"]) -> float:
    """Exact two-sided p-value of wins against losses; outcomes of exactly a half are left out."""
    wins, losses = int((outcomes > 0.5).sum()), int((outcomes < 0.5).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted to bound the chance of any false finding (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return [float(value) for value in adjusted]
