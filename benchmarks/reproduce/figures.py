"""The comparison's figures, for a page on any background."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reproduce.paper import OTHER_K, OURS, K
from benchmarks.reproduce.results import Contrast
from benchmarks.reproduce.study import Arm
from data.artifacts.atomic import write_bytes
from data.artifacts.schemas import Role

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reproduce",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
GROUPS = ("#8b93a1", "#4f7cdb", "#1f9d66")
"""Colours of the groups of arms, in their order."""
MARKERS = {Role.VOTER: "o", Role.HELD_OUT: "D", Role.ORACLE: "*"}
COLOURS = ("#d1495b", "#edae49", "#00798c", "#7f5aa8", "#30343f", "#30343f")
"""Colours of the judges, voters first."""


def win_rates(contrasts: Mapping[str, Contrast], arms: Sequence[Arm]) -> Figure:
    """Every arm against the base: the voters' average with its seeds, and every judge."""
    shown = [arm for arm in arms if arm.name in contrasts]
    colours = dict(zip(dict.fromkeys(arm.group for arm in arms), GROUPS, strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.3 + 0.36 * len(shown)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for place, arm in enumerate(shown):
            _average(left, place, contrasts[arm.name], colours[arm.group])
            _judges(right, place, contrasts[arm.name], labelled=place == 0)
        left.set_yticks(range(len(shown)), [arm.title for arm in shown])
        for label, arm in zip(left.get_yticklabels(), shown, strict=True):
            label.set_fontweight("bold" if arm.name == OURS else "normal")
        left.set_ylim(len(shown) - 0.4, -0.6)
        left.set_xlabel("average win rate of the voters against the base, %")
        right.set_xlabel("win rate against the base by each judge, %")
        for axes in (left, right):
            axes.axvline(50, color="#30343f", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.grid(axis="x", alpha=0.25, linewidth=0.7)
            axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower right", ncols=6, frameon=False, fontsize="small")
        return figure


def _average(axes: Axes, place: int, contrast: Contrast, colour: str) -> None:
    low, value, high = (
        100 * v for v in (contrast.average.low, contrast.average.value, contrast.average.high)
    )
    axes.plot([low, high], [place, place], color=colour, linewidth=2.4, solid_capstyle="round")
    axes.plot([value], [place], "o", color=colour, markersize=6.5)
    seeds = [100 * seed["average"] for seed in contrast.by_seed]
    axes.plot(seeds, [place + 0.27] * len(seeds), "|", color=colour, markersize=7, alpha=0.8)


def _judges(axes: Axes, place: int, contrast: Contrast, *, labelled: bool) -> None:
    rates = contrast.comparison.rates
    values = [100 * rate.win_rate.value for rate in rates]
    axes.plot([min(values), max(values)], [place, place], color="#c9ced6", linewidth=2, zorder=1)
    for rate, value, colour in zip(rates, values, COLOURS, strict=False):
        label = rate.metric.replace("_", " ") if labelled else None
        size = 10 if rate.role is Role.ORACLE else 5.5
        axes.plot([value], [place], MARKERS[rate.role], color=colour, markersize=size, label=label)


def snapshots(contrasts: Mapping[str, Contrast]) -> Figure | None:
    """Win rates over the cadence of snapshots; None with fewer than three cadences."""
    names = {k: f"{OURS}_k{k}" for k in OTHER_K} | {K: OURS}
    every = [k for k in sorted(names) if names[k] in contrasts]
    if len(every) < 3:
        return None
    arms = [names[k] for k in every]
    ticks = [str(k) for k in every]
    if "majority" in contrasts:
        arms, ticks = [*arms, "majority"], [*ticks, "never"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(len(arms))
        _line(axes, places, [contrasts[arm] for arm in arms])
        axes.set_xticks(places, ticks)
        axes.set_xlabel("optimizer steps between two snapshots (K)")
        axes.set_ylabel("win rate against the base, %")
        axes.grid(axis="y", alpha=0.25, linewidth=0.7)
        axes.legend(frameon=False, fontsize="small")
        return figure


def _line(axes: Axes, places: np.ndarray, contrasts: Sequence[Contrast]) -> None:
    judges = [rate.metric for rate in contrasts[0].comparison.rates if rate.role is not Role.VOTER]
    series = {"voters' average": [contrast.average for contrast in contrasts]}
    series |= {
        metric: [contrast.rate(metric).win_rate for contrast in contrasts] for metric in judges
    }
    for shift, (name, estimates), colour in zip(
        (-0.08, 0, 0.08), series.items(), ("#4f7cdb", "#30343f", "#d1495b"), strict=False
    ):
        value = np.array([100 * e.value for e in estimates])
        ends = np.abs(np.array([[100 * e.low, 100 * e.high] for e in estimates]).T - value)
        label = name.replace("_", " ")
        axes.errorbar(places + shift, value, ends, fmt="o-", color=colour, capsize=3, label=label)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG and as PNG beside it; equal figures give equal SVG."""
    for suffix in (".svg", ".png"):
        buffer = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else None
        with mpl.rc_context(STYLE):
            figure.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
        write_bytes(path.with_suffix(suffix), buffer.getvalue())
