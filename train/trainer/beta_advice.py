"""What beta would have given which gradient factor, by the margins of a run's first steps.

The metrics log has quantiles of each step's margins, which are not scaled by beta. So the factor at
any beta can be computed afterwards; how other margins would have come of another beta cannot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from data.artifacts.atomic import ShardError
from train.config import AUTO, LOGISTIC
from train.dpo.auto_beta import mean_factor
from train.trainer.metrics_log import read_lines

FIRST = 50
"""Steps that are looked at."""
ENOUGH = 10
"""Fewest logged steps among them."""
GRID = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Betas of the table, as multiples of the run's."""
FINE = 10
"""Points between two quantiles, evenly spread."""
FARTHEST = 1000.0
"""How many times larger or smaller than the run's a suggested beta may be."""


@dataclass(frozen=True, slots=True)
class Margins:
    """The margins of some steps."""

    steps: Sequence[Sequence[float]]
    """Of each step, points that are spread as its pairs' margins are."""

    def factor(self, beta: float) -> float:
        """The mean gradient factor at a beta."""
        return fmean(mean_factor(step, beta) for step in self.steps)

    def error(self, beta: float) -> float:
        """The standard error of `factor` over steps, as if these were independent."""
        return stdev(mean_factor(step, beta) for step in self.steps) / math.sqrt(len(self.steps))

    def beta_for(self, factor: float, near: float) -> float | None:
        """The smallest beta with this factor, to 1 %; None if there is none within `FARTHEST`.

        The factor falls as beta grows, until pairs of negative margin outweigh the others.
        """
        beta, ratio = near / FARTHEST, 1.5
        while self.factor(beta) > factor:
            if beta > near * FARTHEST:
                return None
            beta *= ratio
        while ratio > 1.01:  # the factor is reached between beta / ratio and beta
            ratio **= 0.5
            if self.factor(beta / ratio) <= factor:
                beta /= ratio
        return beta


def points(quantiles: Sequence[float]) -> list[float]:
    """Margins that are spread evenly between neighbouring quantiles: as many as pairs matter."""
    return [
        low + (index + 0.5) / FINE * (high - low)
        for low, high in zip(quantiles, quantiles[1:], strict=False)
        for index in range(FINE)
    ]


def advise(folder: Path, settings: Mapping[str, Any] | None, target: float) -> None:
    """Print a table of beta and factor of a run, and which beta has the target.

    `folder` is the run's `train/`, `settings` what it was begun with.

    Raises:
        ValueError: There is no such run, its objective has no such factor, or too few steps.
    """
    if settings is None:
        raise ShardError(f"{folder} has no run; `make train` begins one, and 50 steps are enough")
    train = settings["train"]
    check_objective(train["objective"]["kind"])
    lines = first_lines(folder / "journal.jsonl")
    steps = [points(line["margin_quantiles"]) for line in lines]
    late = Margins(steps[len(steps) // 2 :])
    beta = train["auto_beta"]["start"] if train["beta"] == AUTO else train["beta"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(Margins(steps), late, beta, lines))
    console.print(suggestion(late, beta, target))
    console.print("What is unsure:")
    for reason in doubts(lines, train):
        console.print(f"- {reason}")


def check_objective(kind: str) -> None:
    """Refuse a run without such a factor.

    Raises:
        ShardError: Says which objectives have it.
    """
    if kind not in (allowed := [objective.value for objective in LOGISTIC]):
        raise ShardError(
            f"the run's train.objective.kind={kind} has no gradient factor sigmoid(-beta m / 2); "
            f"advice is for runs with {', '.join(allowed)}"
        )


def first_lines(journal: Path) -> list[dict[str, Any]]:
    """The lines of the first steps.

    Raises:
        ShardError: They are too few, or an earlier version wrote them.
    """
    lines = [line for line in read_lines(journal) if line["step"] <= FIRST]
    if len(lines) < ENOUGH:
        raise ShardError(
            f"{journal} has {len(lines)} lines of the first {FIRST} steps; at least {ENOUGH} are "
            "needed: train on, or with a smaller train.log_every"
        )
    if not all(isinstance(line.get("margin_quantiles"), list) for line in lines):
        raise ShardError(
            f"{journal} has no margin_quantiles: an earlier version wrote it; train {FIRST} steps "
            "under another RUN"
        )
    return lines


def table(every: Margins, late: Margins, beta: float, lines: Sequence[Mapping[str, Any]]) -> Table:
    """Beta and its factor, over all of the steps and over their second half."""
    first, middle, last = (lines[at]["step"] for at in (0, len(lines) // 2, -1))
    rows = Table(title="Mean gradient factor sigmoid(-beta m / 2)", title_justify="left")
    for heading in ("beta", f"steps {first} to {last}", f"steps {middle} to {last}"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for multiple in GRID:
        at = beta * multiple
        name = f"{at:g}{' (this run)' if multiple == 1 else ''}"
        rows.add_row(name, f"{every.factor(at):.3f}", f"{late.factor(at):.3f}")
    floor = 1 - fmean(line["accuracy"] for line in lines[len(lines) // 2 :])
    rows.add_row("no limit", "", f"{floor:.3f} (1 - accuracy)", end_section=True)
    return rows


def suggestion(late: Margins, beta: float, target: float) -> str:
    """The beta whose factor was the target, with the betas two standard errors to either side."""
    best = late.beta_for(target, beta)
    if best is None:
        return (
            f"No beta has a factor of {target:g} on these margins: too many are below 0. Take a "
            "higher target (train.beta=auto train.auto_beta.target=0.45), or look again after more "
            "steps"
        )
    error = 2 * late.error(best)
    low, high = (late.beta_for(target + side * error, beta) for side in (1, -1))
    least = "any smaller one" if low is None or target + error >= 0.5 else rounded(low)
    most = "any larger one" if high is None else rounded(high)
    return (
        f"Suggested for a factor of {target:g}: train.beta={rounded(best)} "
        f"(from {least} to {most}, by two standard errors over the steps)"
    )


def rounded(beta: float) -> str:
    """A beta to two digits."""
    return f"{float(f'{beta:.2g}'):g}"


def doubts(lines: Sequence[Mapping[str, Any]], train: Mapping[str, Any]) -> list[str]:
    """Why the suggestion may be wrong, by this run's settings and margins."""
    half, last = len(lines) // 2, lines[-1]["step"]
    before, after = (
        fmean(line["margin"] for line in part) for part in (lines[:half], lines[half:])
    )
    reasons = [
        f"margins change as training goes on: their mean was {before:.2g} in the first half of "
        f"these steps and {after:.2g} in the second. As they grow, factors fall below those above",
        "these are the margins of a run with its own beta; with another one it would have others",
    ]
    if train["warmup"] >= lines[half]["step"]:
        reasons.append(
            f"the learning rate was still rising: the warm-up takes {train['warmup']} steps"
        )
    if lines[-1]["reference_version"]:
        every = train["reference"]["every"]
        reasons.append(
            f"the reference is renewed every {every} steps, and margins start again at 0"
        )
    if len(lines) < last:
        reasons.append(f"only {len(lines)} of {last} steps are in the log (train.log_every)")
    return reasons
