"""A study in which every arm has its own beta: the choice, and what is trained in which order.

1. Every arm is trained with every beta of the grid, with training seed 0, and judged on validation
   prompts. Its beta is the one with the best average of the voters' win rates against the base; of
   equal ones the largest, which stays nearest to the base.
2. With its own beta every arm is trained with further seeds, from 1 on, and judged on test prompts.
3. Some arms are trained with the same seeds at the two betas between which they are as far from the
   base as the median arm, and judged on the validation prompts.
"""

from collections.abc import Mapping
from functools import partial
from math import log
from pathlib import Path
from statistics import median

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
    tried, final, near = [], [], []
    for unit in plan.units():
        if unit.arm and unit.seed == 0:
            job = partial(work.do_unit, plan, unit, VALIDATION)
            tried.append(Piece(unit.name, plan.folder / unit.name / "log.txt", job, first))
    every = frozenset(piece.name for piece in tried)
    for seed in plan.training_seeds:
        for arm in plan.arms:
            name = f"{arm.name}-{seed}"
            own = frozenset(f"{arm.at(beta).name}-0" for beta in betas(plan))
            path = plan.folder / "logs" / f"{name}.txt"
            final.append(Piece(name, path, partial(do_final, plan, arm, seed), own))
            if plan.grid and arm.name in plan.grid.near:
                job, path = partial(do_near, plan, arm, seed), path.with_name(f"near_{name}.txt")
                near.append(Piece(f"near_{name}", path, job, every | {name}))
    return [*sets, *bases, *tried, *final, *near]


def do_final(plan: Plan, arm: Arm, seed: int) -> None:
    """Train an arm with its own beta, and judge it on test prompts."""
    work.do_unit(plan, Unit(arm.at(chosen(plan, arm)), seed), JUDGE)


def do_near(plan: Plan, arm: Arm, seed: int) -> None:
    """Train an arm at the betas next to the common distance, and judge it on validation prompts."""
    for beta, _ in neighbours(distances(plan, arm), common_distance(plan)):
        work.do_unit(plan, Unit(arm.at(beta), seed), VALIDATION)


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
    return all(work.scores_of(plan, unit, VALIDATION).exists() for unit in tried)


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
    job = plan.judge_job(where)
    path = job.folder / job.evaluate.folder / "distance" / f"denoiser-{unit.name}.json"
    facts = read_json(path, "delete it and rerun the command")["facts"]
    return float(np.mean(facts["squared_difference"]) / np.mean(facts["base_error"]))


def distances(plan: Plan, arm: Arm) -> dict[float, float]:
    """Beta -> distance from the base on validation prompts, of training seed 0."""
    return {beta: distance(plan, Unit(arm.at(beta), 0), VALIDATION) for beta in betas(plan)}


def common_distance(plan: Plan) -> float:
    """The median over the arms of the distance at their own betas."""
    return median(distances(plan, arm)[chosen(plan, arm)] for arm in plan.arms)


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
