"""How often 95 % intervals over prompts and training seeds cover the true win rate.

    python -m benchmarks.coverage

simulates comparisons like those of `make reproduce`: four voters judge an image pair of each of 150
prompts and 5 training seeds. A voter's choice is the sign of a normal variable, whose mean gives
the true win rate and whose variance has parts of the prompt, of prompt and voter, of the training
seed, and of the image pair.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

from benchmarks.reproduce.crossed import interval, two_way_bootstrap
from evaluate.statistics.bootstrap import Estimate

PROMPTS, SEEDS, VOTERS = 150, 5, 4
OF_PROMPT, OF_VOTER = 1.0, 0.7
"""Standard deviations; that of an image pair is 1."""
RATES = (0.5, 0.65, 0.75)
OF_SEED = (0.0, 0.1, 0.2, 0.4)
"""Standard deviations of a training seed: 0.1 moves a win rate of 50 % by 2.5 points."""


def simulated(
    rate: float, of_seed: float, rng: np.random.Generator
) -> Float[np.ndarray, "prompt seed"]:
    """Mean outcomes over the voters, with this true win rate."""
    mean = norm.ppf(rate) * np.sqrt(1 + OF_PROMPT**2 + OF_VOTER**2 + of_seed**2)
    parts = (
        OF_PROMPT * rng.normal(size=(PROMPTS, 1, 1)),
        OF_VOTER * rng.normal(size=(PROMPTS, 1, VOTERS)),
        of_seed * rng.normal(size=(1, SEEDS, 1)),
        rng.normal(size=(PROMPTS, SEEDS, VOTERS)),
    )
    return np.asarray((mean + sum(parts) > 0).mean(-1))


def over_prompts(outcomes: Float[np.ndarray, "prompt seed"]) -> Estimate:
    """The interval that takes the trainings as given."""
    return interval(outcomes.mean(1, keepdims=True))


def coverage(
    rate: float, of_seed: float, method: Callable[..., Estimate], simulations: int
) -> tuple[float, float]:
    """The fraction of intervals that have the true rate in them, and their mean width."""
    rng, inside, widths = np.random.default_rng(0), 0, []
    for _ in range(simulations):
        estimate = method(simulated(rate, of_seed, rng))
        inside += estimate.low <= rate <= estimate.high
        widths.append(estimate.high - estimate.low)
    return inside / simulations, float(np.mean(widths))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=500)
    options = parser.parse_args()
    methods: dict[str, Callable[..., Estimate]] = {
        "over prompts": over_prompts,
        "two-way bootstrap": partial(two_way_bootstrap, resamples=options.resamples, seed=0),
        "t interval": interval,
    }
    print("| win rate, % | seeds' deviation |", " | ".join(methods), "|")
    print("|" + " --- |" * (2 + len(methods)))
    for rate in RATES:
        for of_seed in OF_SEED:
            cells = [f"{100 * rate:g}", f"{of_seed:g}"]
            for method in methods.values():
                inside, width = coverage(rate, of_seed, method, options.simulations)
                cells.append(f"{100 * inside:.1f} (width {100 * width:.1f})")
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
