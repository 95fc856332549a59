"""How far a model is from the base: means over prompts with their intervals. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evaluate.statistics.bootstrap import Bootstrap, Estimate, PerPrompt, per_prompt

RESAMPLES = 1000
"""Bootstrap resamples behind an interval; no verdict depends on one."""


def change(
    base: Float[np.ndarray, " value"],
    model: Float[np.ndarray, " value"],
    prompt: Int[np.ndarray, " value"],
    seed: int,
) -> dict[str, Any]:
    """Means of base and model, and of their difference value by value, with its interval.

    `prompt` numbers the values' prompts from 0: whole prompts are resampled.
    """
    column = {"change": per_prompt(model - base, prompt)}
    estimate = Bootstrap(column, resamples=RESAMPLES, seed=seed).mean("change", is_rate=False)
    return {"base": float(base.mean()), "model": float(model.mean()), "change": estimate}


def denoiser_distance(
    squared: Float[np.ndarray, "level image"],
    base_error: Float[np.ndarray, "level image"],
    levels: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """Mean squared difference of two denoisers' predictions by noise level, and over all levels.

    `fraction` is it as a fraction of the base's own mean squared error at the same level. Images
    are of different prompts, and are resampled.
    """
    names = [str(level) for level in levels]
    ones = np.ones(squared.shape[1])
    columns = {name: PerPrompt(row, ones) for name, row in zip(names, squared, strict=True)}
    bootstrap = Bootstrap(columns, resamples=RESAMPLES, seed=seed)

    def entry(estimate: Estimate, error: float) -> dict[str, Any]:
        fraction = estimate.value / error if error else None
        return {"squared_difference": estimate, "base_error": error, "fraction": fraction}

    errors = base_error.mean(1)
    by_level: list[Mapping[str, Any]] = [
        {"noise": level} | entry(bootstrap.mean(name, is_rate=False), float(error))
        for level, name, error in zip(levels, names, errors, strict=True)
    ]
    mean = entry(bootstrap.mean(*names, is_rate=False), float(errors.mean()))
    return {"levels": by_level, "mean": mean}
