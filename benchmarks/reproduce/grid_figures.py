"""Figures of a study in which every arm has its own beta."""

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reproduce.figures import COLOURS, STYLE
from benchmarks.reproduce.grid_results import Progress
from benchmarks.reproduce.plan import BASE
from benchmarks.reproduce.study import Arm

MARKERS = ("o", "^")
"""Of the groups of arms, in their order."""


def pareto(progress: Progress) -> Figure:
    """The weakest voter's win rate over the distance from the base, with each arm's own beta.

    A line joins the arms that no other beats in both.
    """
    points = {
        arm: (100 * progress.final_distance(arm), 100 * each.rates[each.weakest].value)
        for arm in progress.arms
        if (each := progress.final.get((arm.name, BASE)))
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.add_subplot()
        _points(axes, points)
        front = sorted(points[arm] for arm in best(points))
        axes.plot(*zip(*front, strict=True), color="#30343f", linewidth=1, zorder=1)
        axes.set_xlabel("distance from the base: difference of predictions, % of the base's error")
        axes.set_ylabel("win rate of the weakest voter against the base, %")
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.legend(frameon=False, title="reference")
        return figure


def _points(axes: Axes, points: dict[Arm, tuple[float, float]]) -> None:
    groups = list(dict.fromkeys(arm.group for arm in points))
    for group, marker, colour in zip(groups, MARKERS, COLOURS[::2], strict=False):
        own = [point for arm, point in points.items() if arm.group == group]
        axes.plot(*zip(*own, strict=True), marker, color=colour, label=group, markersize=7)
    for arm, point in points.items():
        text = arm.title.removesuffix(f", {arm.group}")
        axes.annotate(text, point, (5, 3), textcoords="offset points", fontsize=7)


def best(points: dict[Arm, tuple[float, float]]) -> list[Arm]:
    """The arms than which no other is both nearer to the base and better by the weakest voter."""
    return [
        arm
        for arm, (distance, rate) in points.items()
        if not any(
            (d <= distance and r >= rate) and (d, r) != (distance, rate) for d, r in points.values()
        )
    ]


def curves(progress: Progress, arms: tuple[Arm, ...]) -> Figure:
    """The voters' average on validation prompts over the distance, from beta to beta."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for arm, colour in zip(arms, COLOURS, strict=False):
            rates, distances = progress.rates[arm.name], progress.distances[arm.name]
            points = sorted((100 * distances[beta], 100 * rate) for beta, rate in rates.items())
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=arm.title)
        axes.axvline(100 * progress.target, color="#30343f", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_xlabel("distance from the base, % of its error")
        axes.set_ylabel("voters' average against the base, %")
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.legend(frameon=False, fontsize="small")
        return figure
