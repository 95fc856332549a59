"""Writes a comparison for people: one self-contained HTML file, Markdown, CSV and LaTeX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from data.artifacts.atomic import write_bytes
from data.artifacts.html import render
from evaluate.reporting import gallery, plots
from evaluate.reporting.distance import HEADINGS as DISTANCE
from evaluate.reporting.distance import distance_rows, distance_sentence, short_distance

TEMPLATE = Path(__file__).parent / "report.html.j2"
HEADINGS = ("metric", "role", "win rate", "95 % interval", "score change", "wins / ties / losses")


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    scores: pl.DataFrame,
    *,
    journal: Path,
    num_pairs: int,
    seed: int,
) -> None:
    """Write `winrates.json` in every readable form beside it, `report.html` last."""
    comparisons = summary["comparisons"]
    write_bytes(folder / "report.md", markdown(summary).encode())
    write_bytes(folder / "winrates.tex", latex(comparisons).encode())
    write_bytes(folder / "winrates.csv", csv_of(folder / "winrates.parquet").encode())
    sections = [
        {
            "comparison": comparison,
            "forest": Markup(plots.forest(comparison)),
            "changes": Markup(plots.changes(comparison)),
            "distance": distance_rows(distance) if (distance := comparison.get("distance")) else [],
            "distance_sentence": distance_sentence(comparison),
            "galleries": gallery.galleries(scores, folder, comparison, num_pairs, seed),
        }
        for comparison in comparisons
    ]
    curves = plots.training(journal)
    page = render(
        TEMPLATE,
        {
            "span": span,
            "percent": lambda value: f"{value:.1%}",
            "short_distance": short_distance,
        },
        summary["provenance"],
        summary=summary,
        sections=sections,
        distance_headings=DISTANCE,
        curves=Markup(curves) if curves else None,
        protocol=protocol(summary),
    )
    write_bytes(folder / "report.html", page)


def markdown(summary: Mapping[str, Any]) -> str:
    """The comparison as Markdown, for a model card."""
    parts = []
    for comparison in summary["comparisons"]:
        rows = [HEADINGS, ("---",) * len(HEADINGS), *(row(rate) for rate in comparison["rates"])]
        parts += [f"**{comparison['sentence']}**", "", *(f"| {' | '.join(r)} |" for r in rows), ""]
        parts += [
            f"Average win rate of the voters: {span(comparison['average'])}. "
            f"All voters better at once: {span(comparison['joint_dominance'])} of prompts; "
            f"all worse at once: {span(comparison['joint_loss'])}.",
            "",
        ]
        if distance := comparison.get("distance"):
            rows = [DISTANCE, ("---",) * len(DISTANCE), *distance_rows(distance)]
            parts += [*(f"| {' | '.join(r)} |" for r in rows), ""]
    return "\n".join([*parts, protocol(summary), ""])


def protocol(summary: Mapping[str, Any]) -> str:
    """How images were sampled and compared, in a few sentences."""
    prompts, settings = summary["prompts"], summary["protocol"]
    seeds = settings["seeds"]
    images = f"{seeds} image{'s' if seeds > 1 else ''} for each prompt and model"
    left = ", ".join(f"{prompts[key]} {key}" for key in ("empty", "repeated") if prompts[key])
    if prompts["trained"]:
        left = ", ".join([*filter(None, [left]), f"{prompts['trained']} that were trained on"])
    rate = settings["detectable"]
    power = f" So many prompts detect a win rate of {rate:.1%} with 80 % power." if rate else ""
    return (
        f"Prompt set {prompts['name']}: {prompts['prompts']} prompts, sha256 "
        f"{prompts['sha256'][:12]}{f', left out: {left}' if left else ''}. {images} "
        f"from the same initial noise for every model; {settings['scheduler']} scheduler, "
        f"{settings['steps']} steps, guidance {settings['guidance']}, {settings['resolution']} px. "
        "Win rates count ties half; intervals are 95 % paired bootstrap over prompts "
        f"({settings['resamples']} resamples). A verdict needs the interval and an exact sign test."
        f"{power} "
        "Voters judge a model trained on their own votes: held-out and oracle judges are the "
        "stronger evidence."
    )


def latex(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The win rates as a LaTeX table (needs booktabs)."""
    lines = [r"\begin{tabular}{llrrr}", r"\toprule"]
    lines += [r"model & metric & win rate (\%) & 95\,\% interval & verdict \\", r"\midrule"]
    for comparison in comparisons:
        for rate in comparison["rates"]:
            low, value, high = (100 * rate["win_rate"][key] for key in ("low", "value", "high"))
            names = [_tex(comparison["model"]), _tex(rate["metric"])]
            numbers = [f"{value:.1f}", f"[{low:.1f}, {high:.1f}]", rate["verdict"]]
            lines.append(" & ".join([*names, *numbers]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def csv_of(path: Path) -> str:
    """`winrates.parquet` as CSV."""
    text: str = pl.read_parquet(path).write_csv()
    return text


def row(rate: Mapping[str, Any]) -> tuple[str, ...]:
    """One metric's cells, in the order of `HEADINGS`."""
    return (
        rate["metric"],
        rate["role"].replace("_", " "),
        f"{rate['win_rate']['value']:.1%}",
        f"{rate['win_rate']['low']:.1%} to {rate['win_rate']['high']:.1%}",
        f"{rate['change']['value']:+.4g}",
        f"{rate['wins']} / {rate['ties']} / {rate['losses']}",
    )


def span(estimate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{estimate['value']:.1%} ({estimate['low']:.1%} to {estimate['high']:.1%})"


def _tex(text: str) -> str:
    return "".join("\\" + letter if letter in "_%&#$" else letter for letter in text)
