"""What a study with a grid of betas has shown so far: choices, distances and matches."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.reproduce import grid
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

    # --- sides -----------------------------------------------------------------------------------

    def final_sides(self, arm: Arm) -> dict[int, Side]:
        """Seed -> the arm with its own beta, on test prompts."""
        sides: dict[int, Side] = {}
        for seed in self.plan.training_seeds:
            unit = Unit(arm.at(self.betas[arm.name]), seed)
            if grid.is_finished(self.plan, unit, JUDGE):
                sides[seed] = [(1.0, grid.scores(self.plan, unit, JUDGE))]
        return sides

    def side_at(self, arm: Arm, target: float) -> Side:
        """The arm at a distance, on validation prompts; empty where that is out of its reach."""
        weights = grid.neighbours(self.distances[arm.name], target)
        units = [(weight, Unit(arm.at(beta), 0)) for beta, weight in weights]
        return [(weight, grid.scores(self.plan, unit, VALIDATION)) for weight, unit in units]

    def base_sides(self, where: str) -> dict[int, Side]:
        """Every seed -> the base."""
        side = [(1.0, grid.scores(self.plan, Unit(None, 0), where))]
        return dict.fromkeys((0, *self.plan.training_seeds), side)

    # --- matches ---------------------------------------------------------------------------------

    @cached_property
    def final(self) -> dict[tuple[str, str], Match]:
        """Every arm against the base and as the claims say, each with its own beta."""
        sides = {arm.name: self.final_sides(arm) for arm in self.arms}
        everyone = {**sides, BASE: self.base_sides(JUDGE)}
        wanted = [*((name, BASE) for name in sides), *self.claimed]
        return {
            (a, b): match(a, b, everyone[a], everyone[b], self.judges)
            for a, b in wanted
            if everyone[a].keys() & everyone[b].keys()
        }

    @cached_property
    def near(self) -> dict[tuple[str, str], Match]:
        """Matches at equal distance, of those arms that can be as far.

        Against the base it is the common distance; of two arms it is one that both have.
        """
        base = self.base_sides(VALIDATION)
        sides = {arm.name: self.side_at(arm, self.target) for arm in self.arms}
        matches = {
            (name, BASE): match(name, BASE, {0: side}, base, self.judges)
            for name, side in sides.items()
            if side
        }
        for a, b in self.claimed:
            if target := self.shared_distance(a, b):
                one, other = (self.side_at(self.arm(name), target) for name in (a, b))
                if one and other:
                    matches[a, b] = match(a, b, {0: one}, {0: other}, self.judges)
        return matches

    @cached_property
    def claimed(self) -> list[tuple[str, str]]:
        """The pairs of arms that the claims compare, of those with a beta of their own."""
        pairs = [(a, b) for a, others in self.plan.study.claims.values() for b in others]
        return [pair for pair in dict.fromkeys(pairs) if {*pair} <= self.betas.keys()]

    def shared_distance(self, one: str, other: str) -> float | None:
        """The middle of the distances that two arms both have."""
        return grid.middle(self.distances[one], self.distances[other])

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)
