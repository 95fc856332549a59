"""The report's plots as inline SVG; text and axes take the page's colour, light or dark."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"
"""Placeholder for the page's text colour; replaced by `currentColor` in the finished SVG."""
COLOURS = {"better": "#1f9d66", "worse": "#d1495b", "not shown": "#8b93a1"}
ACCENT = "#4f7cdb"
PANELS = {
    "loss": ("loss",),
    "implicit accuracy": ("accuracy",),
    "denoising error": ("policy_winner_error", "policy_loser_error"),
}
"""Training curves: title -> the journal's keys."""
NEUTRAL = {"loss": float(np.log(2)), "implicit accuracy": 0.5}
"""The values of a policy that equals its reference."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def forest(comparison: dict[str, Any]) -> str:
    """A forest plot: win rates with intervals, one line per metric, and the voters' average."""
    rates = comparison["rates"]
    names = [*(_label(rate) for rate in rates), "average of voters"]
    estimates = [*(rate["win_rate"] for rate in rates), comparison["average"]]
    colours = [*(COLOURS[rate["verdict"]] for rate in rates), ACCENT]
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(len(names))
        _lines(axes, names, estimates, colours, scale=100.0)
        axes.axvline(50, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(-2, 102)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("win rate in %, with 95 % interval")
        label = f"Win rates of {comparison['model']} against {comparison['base']}"
        return _svg(figure, label, salt="forest" + comparison["model"])


def changes(comparison: dict[str, Any]) -> str:
    """Bars: each score's mean change, in standard deviations of the base's scores."""
    rates = [rate for rate in comparison["rates"] if rate["std_base"] > 0]
    scaled = [
        {key: value / rate["std_base"] for key, value in rate["change"].items()} for rate in rates
    ]
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(len(rates))
        places = np.arange(len(rates))
        values = [estimate["value"] for estimate in scaled]
        axes.barh(places, values, 0.55, color=[COLOURS[r["verdict"]] for r in rates], alpha=0.55)
        _lines(axes, [_label(rate) for rate in rates], scaled, [INK] * len(rates), marker="")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("mean score change, in base standard deviations")
        label = f"Score changes from {comparison['base']} to {comparison['model']}"
        return _svg(figure, label, salt="changes" + comparison["model"])


def training(journal: Path) -> str | None:
    """Training curves of loss, implicit accuracy and denoising errors; None if there are none.

    In Diffusion-DPO's known failure the errors of winner and loser rise together.
    """
    lines = _journal(journal)
    panels = {
        title: {key: points for key in keys if len(points := _points(lines, key)) > 1}
        for title, keys in PANELS.items()
    }
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 1.6 * len(panels) + 0.3), layout="constrained")
        for place, (title, series) in enumerate(panels.items()):
            axes = figure.add_subplot(len(panels), 1, place + 1)
            _curves(axes, series)
            axes.set_ylabel(title)
            if title in NEUTRAL:
                axes.axhline(NEUTRAL[title], color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
        axes.set_xlabel("optimizer step")
        return _svg(figure, "Training curves", salt="training")


def _curves(axes: Axes, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for (key, points), colour in zip(series.items(), (ACCENT, COLOURS["worse"]), strict=False):
        step, value = np.array(points, dtype=float).T
        axes.plot(step, value, color=colour, linewidth=0.8, alpha=0.35)
        name = key.removeprefix("policy_").removesuffix("_error")
        axes.plot(step, _smooth(value), color=colour, linewidth=1.6, label=name)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize="small")


def _canvas(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 0.75 + 0.34 * rows), layout="constrained")
    return figure, figure.add_subplot()


def _lines(
    axes: Axes,
    names: Sequence[str],
    estimates: Sequence[dict[str, float]],
    colours: Sequence[str],
    scale: float = 1.0,
    marker: str = "o",
) -> None:
    for place, (estimate, colour) in enumerate(zip(estimates, colours, strict=True)):
        low, value, high = (scale * estimate[key] for key in ("low", "value", "high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([value], [place], marker=marker, color=colour, markersize=6.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first metric on top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.7)


def _label(rate: dict[str, Any]) -> str:
    metric, role = rate["metric"], rate["role"].replace("_", " ")
    return metric if rate["role"] in ("voter", metric) else f"{metric} ({role})"


def _smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over a tenth of the series, with a shorter window at its ends."""
    width = max(1, len(values) // 10)
    kernel = np.ones(width)
    weight = np.convolve(np.ones(len(values)), kernel, "same")
    smooth: np.ndarray = np.convolve(values, kernel, "same") / weight
    return smooth


def _journal(path: Path) -> list[dict[str, Any]]:
    """The lines of the metrics log that can be plotted; truncated and foreign ones are skipped."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and _has(line, "step"):
            lines.append(line)
    return lines


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if _has(line, key)]


def _has(line: dict[str, Any], key: str) -> bool:
    return isinstance(line.get(key), int | float) and bool(np.isfinite(line[key]))


def _svg(figure: Figure, label: str, salt: str) -> str:
    """The figure as an `<svg>` element that scales with the page; equal figures give equal text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)
    assert width is not None
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    size = f'style="max-width:{1.6 * float(width.group(1)):.0f}px"'
    quoted = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{quoted}" {size}', 1)
