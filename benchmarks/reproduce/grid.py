"""A study in which every arm has its own beta: the choice, and what is trained in which order.

1. Every arm is trained with every beta of the grid, with training seed 0, and judged on validation
   prompts. Its beta is the one with the best average of the voters' win rates against the base; of
   equal ones the largest, which stays nearest to the base.
2. With its own beta every arm is trained with further seeds, from 1 on, and judged on test prompts.

What is compared at equal distance are the models of 1.
"""

from collections.abc import Mapping
from functools import partial
from math import log, sqrt
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.reproduce import work
from benchmarks.reproduce.children import Piece
from benchmarks.reproduce.match import match
from benchmarks.reproduce.plan import BASE, JUDGE, VALIDATION, Plan, Unit
from benchmarks.reproduce.study import Arm
from data.artifacts.atomic import read_json
from evaluate.run import judges_of

Neighbours = tuple[tuple[float, float], ...]
"""Betas and their weights, which add up to 1; empty where the distance is out of reach."""


def pieces(plan: Plan) -> list[Piece]:
    """Everything to do, each piece with those that it needs."""
    sets = [work.pairs_piece(plan, pairs) for pairs in plan.pair_sets()]
    bases = [Piece(f"{BASE}_{where}", plan.folder / where / "log.txt",
                   partial(work.do_unit, plan, Unit(None, 0), where))
             for where in (VALIDATION, JUDGE)]  # fmt: skip
    first = frozenset(piece.name for piece in [*sets, *bases])
    tried, final = [], []
    for unit in plan.units():
        if unit.arm and unit.seed == 0:
            job = partial(work.do_unit, plan, unit, VALIDATION)
            tried.append(Piece(unit.name, plan.folder / unit.name / "log.txt", job, first))
    for seed in plan.training_seeds:
        for arm in plan.arms:
            name = f"{arm.name}-{seed}"
            own = frozenset(f"{arm.at(beta).name}-0" for beta in betas(plan))
            path = plan.folder / "logs" / f"{name}.txt"
            final.append(Piece(name, path, partial(do_final, plan, arm, seed), own))
    return [*sets, *bases, *tried, *final]


def do_final(plan: Plan, arm: Arm, seed: int) -> None:
    """Train an arm with its own beta, and judge it on test prompts."""
    work.do_unit(plan, Unit(arm.at(chosen(plan, arm)), seed), JUDGE)


def judged(plan: Plan) -> dict[str, Path]:
    """Unit -> its file of scores, if it exists; an arm's are those with its own beta.

    The base's are those of the test prompts.
    """
    paths = {}
    for unit in plan.units():
        if unit.arm is None:
            paths[unit.name] = work.scores_of(plan, unit)
        elif unit.seed == 0:
            paths[unit.name] = work.scores_of(plan, unit, VALIDATION)
        elif is_chosen(plan, unit.arm):
            own = Unit(unit.arm.at(chosen(plan, unit.arm)), unit.seed)
            paths[unit.name] = work.scores_of(plan, own)
    return {name: path for name, path in paths.items() if path.exists()}


def is_chosen(plan: Plan, arm: Arm) -> bool:
    """Whether an arm was judged with every beta."""
    tried = [Unit(None, 0), *(Unit(arm.at(beta), 0) for beta in betas(plan))]
    return all(is_finished(plan, unit, VALIDATION) for unit in tried)


def is_finished(plan: Plan, unit: Unit, where: str) -> bool:
    """Whether a unit was judged, and its distance measured if it is not the base."""
    measured = unit.arm is None or distance_file(plan, unit, where).exists()
    return measured and work.scores_of(plan, unit, where).exists()


def betas(plan: Plan) -> tuple[float, ...]:
    """The betas that are tried."""
    assert plan.grid is not None
    return plan.grid.betas


# --- the choice ----------------------------------------------------------------------------------


def chosen(plan: Plan, arm: Arm) -> float:
    """An arm's own beta."""
    return choose(rates(plan, arm))


def choose(rates: Mapping[float, float]) -> float:
    """The beta with the best rate; of equal ones the largest."""
    return max(rates, key=lambda beta: (rates[beta], beta))


def rates(plan: Plan, arm: Arm) -> dict[float, float]:
    """Beta -> the average of the voters' win rates against the base, on validation prompts."""
    judges = judges_of(plan.judge_job(VALIDATION))
    base = {0: [(1.0, scores(plan, Unit(None, 0), VALIDATION))]}
    matches = {}
    for beta in betas(plan):
        side = {0: [(1.0, scores(plan, Unit(arm.at(beta), 0), VALIDATION))]}
        matches[beta] = match(arm.name, BASE, side, base, judges)
    return {beta: each.average.value for beta, each in matches.items()}


def scores(plan: Plan, unit: Unit, where: str) -> pl.DataFrame:
    """A unit's scores."""
    return pl.read_parquet(work.scores_of(plan, unit, where))


# --- distance ------------------------------------------------------------------------------------


def distance(plan: Plan, unit: Unit, where: str) -> float:
    """Mean squared difference of a unit's and the base's predictions, over levels and images.

    It is a fraction of the base's own mean squared error on the same inputs.
    """
    path = distance_file(plan, unit, where)
    facts = read_json(path, "delete it and rerun the command")["facts"]
    return float(np.mean(facts["squared_difference"]) / np.mean(facts["base_error"]))


def distance_file(plan: Plan, unit: Unit, where: str) -> Path:
    """The file of a unit's distance, which is measured last."""
    job = plan.judge_job(where)
    return job.folder / job.evaluate.folder / "distance" / f"denoiser-{unit.name}.json"


def distances(plan: Plan, arm: Arm) -> dict[float, float]:
    """Beta -> distance from the base on validation prompts, of training seed 0."""
    return {beta: distance(plan, Unit(arm.at(beta), 0), VALIDATION) for beta in betas(plan)}


def middle(one: Mapping[float, float], other: Mapping[float, float]) -> float | None:
    """The middle, in the logarithm, of the distances that two arms both have; None without one.

    An arm has all distances between its nearest and its furthest model.
    """
    nearest = max(min(one.values()), min(other.values()))
    furthest = min(max(one.values()), max(other.values()))
    return sqrt(nearest * furthest) if nearest <= furthest else None


def neighbours(distances: Mapping[float, float], target: float) -> Neighbours:
    """The two neighbouring betas between whose distances the target lies, with their weights.

    Weights are linear in the logarithm of the distance. From the largest beta on the first two are
    taken.
    """
    ordered = sorted(distances, reverse=True)
    for large, small in zip(ordered, ordered[1:], strict=False):
        low, high = distances[large], distances[small]
        if low <= target <= high and low < high:
            part = log(target / low) / log(high / low)
            return (large, 1 - part), (small, part)
    return ()
