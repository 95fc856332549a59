"""What a study with a grid of betas has shown so far: choices, distances and matches."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.reproduce import grid, work
from benchmarks.reproduce.match import Match, Side, match
from benchmarks.reproduce.plan import BASE, JUDGE, VALIDATION, Plan, Unit
from benchmarks.reproduce.study import Arm
from evaluate.run import judges_of
from evaluate.statistics.winrate import Judge


@dataclass(frozen=True)
class Progress:
    """The finished part of a study."""

    plan: Plan

    @cached_property
    def judges(self) -> tuple[Judge, ...]:
        """All judges, voters first."""
        return tuple(judges_of(self.plan.judge_job()))

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that have their own beta."""
        return tuple(arm for arm in self.plan.arms if grid.is_chosen(self.plan, arm))

    @cached_property
    def rates(self) -> dict[str, dict[float, float]]:
        """Arm -> beta -> the voters' average on validation prompts."""
        return {arm.name: grid.rates(self.plan, arm) for arm in self.arms}

    @cached_property
    def betas(self) -> dict[str, float]:
        """Arm -> its own beta."""
        return {name: grid.choose(rates) for name, rates in self.rates.items()}

    @cached_property
    def distances(self) -> dict[str, dict[float, float]]:
        """Arm -> beta -> its distance from the base on validation prompts."""
        return {arm.name: grid.distances(self.plan, arm) for arm in self.arms}

    @cached_property
    def target(self) -> float:
        """The common distance, among the finished arms."""
        own = [self.distances[name][beta] for name, beta in self.betas.items()]
        return float(np.median(own))

    def final_distance(self, arm: Arm) -> float:
        """The mean over training seeds of its distance at its own beta, on test prompts."""
        units = [Unit(arm.at(self.betas[arm.name]), seed) for seed in self.final_sides(arm)]
        return float(np.mean([grid.distance(self.plan, unit, JUDGE) for unit in units]))

    def weights(self, arm: Arm) -> grid.Neighbours:
        """The betas between which an arm is at the common distance, and their weights."""
        return grid.neighbours(self.distances[arm.name], self.target)

    # --- sides -----------------------------------------------------------------------------------

    def final_sides(self, arm: Arm) -> dict[int, Side]:
        """Seed -> the arm with its own beta, on test prompts."""
        sides: dict[int, Side] = {}
        for seed in self.plan.training_seeds:
            unit = Unit(arm.at(self.betas[arm.name]), seed)
            if work.scores_of(self.plan, unit, JUDGE).exists():
                sides[seed] = [(1.0, grid.scores(self.plan, unit, JUDGE))]
        return sides

    def near_sides(self, arm: Arm) -> dict[int, Side]:
        """Seed -> the arm at the common distance, on validation prompts; seed 0 is the grid's."""
        weights = self.weights(arm)
        sides: dict[int, Side] = {}
        for seed in (0, *self.plan.training_seeds) if weights else ():
            units = [(weight, Unit(arm.at(beta), seed)) for beta, weight in weights]
            if all(work.scores_of(self.plan, unit, VALIDATION).exists() for _, unit in units):
                sides[seed] = [
                    (weight, grid.scores(self.plan, unit, VALIDATION)) for weight, unit in units
                ]
        return sides

    def base_sides(self, where: str) -> dict[int, Side]:
        """Every seed -> the base."""
        side = [(1.0, grid.scores(self.plan, Unit(None, 0), where))]
        return dict.fromkeys((0, *self.plan.training_seeds), side)

    # --- matches ---------------------------------------------------------------------------------

    @cached_property
    def final(self) -> dict[tuple[str, str], Match]:
        """Matches with each arm's own beta."""
        sides = {arm.name: self.final_sides(arm) for arm in self.arms}
        return self._matches(sides, self.base_sides(JUDGE))

    @cached_property
    def near(self) -> dict[tuple[str, str], Match]:
        """Matches at the common distance; without the arms that cannot be as far."""
        sides = {arm.name: self.near_sides(arm) for arm in self.arms}
        return self._matches(sides, self.base_sides(VALIDATION))

    def _matches(
        self, sides: Mapping[str, dict[int, Side]], base: dict[int, Side]
    ) -> dict[tuple[str, str], Match]:
        """Every arm against the base, and the arms that the claims compare."""
        everyone = {**sides, BASE: base}
        wanted = [(name, BASE) for name in sides]
        wanted += [(a, b) for a, others in self.plan.study.claims.values() for b in others]
        return {
            (a, b): match(a, b, everyone[a], everyone[b], self.judges)
            for a, b in dict.fromkeys(wanted)
            if everyone.get(a, {}).keys() & everyone.get(b, {}).keys()
        }
