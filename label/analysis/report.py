"""The label report: one HTML file that carries its plots and images in itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from data.artifacts.atomic import write_bytes
from data.artifacts.html import render
from label.analysis.console import rule_words
from label.analysis.gallery import Gallery
from label.analysis.statistics import Gaps, Statistics
from label.analysis.tables import coefficient, number, percent
from label.config import HUMAN

TEMPLATE = Path(__file__).parent / "report.html.j2"
PLOT = (244, 64)
"""Width and height of a histogram, in its own units."""


def write_report(
    folder: Path, statistics: Statistics, galleries: list[Gallery], facts: Mapping[str, Any]
) -> Path:
    """Write `report.html` beside the labels."""
    filters = {"number": number, "percent": percent, "coefficient": coefficient}
    page = render(
        TEMPLATE,
        filters | {"histogram": histogram},
        facts,
        name=folder.name,
        study=statistics,
        rule=rule_words(statistics.voting_rule),
        galleries=galleries,
        voters=statistics.tables["agreement"].frame["voter"].to_list(),
        classes={word: class_of(word, statistics) for word in statistics.outcomes},
    )
    path = folder / "report.html"
    write_bytes(path, page)
    return path


def class_of(outcome: str, statistics: Statistics) -> str:
    """CSS class of a word of `decided_by`: by the rule, by the tie rule, left open, not scored."""
    spec = statistics.voting_rule.spec
    if outcome == spec.rule.value:
        return "done"
    if outcome in (HUMAN, f"metric:{spec.tie_metric}"):
        return "helped"
    return "failed" if outcome in statistics.statuses else "open"


def histogram(gaps: Gaps) -> Markup:
    """A metric's score gaps as an `<svg>`: left image 1 leads, right image 0."""
    width, height = PLOT
    step, tallest = width / len(gaps.counts), max(gaps.counts) or 1
    middle = len(gaps.counts) // 2
    bars = {"below": "", "level": "", "above": ""}
    for place, count in enumerate(gaps.counts):
        tall = height * count / tallest
        side = "level" if place == middle else "above" if place > middle else "below"
        bars[side] += f"M{place * step:.1f} {height}v{-tall:.1f}h{step - 0.6:.1f}v{tall:.1f}z"
    tie = min(gaps.tie / gaps.limit, 1) * width / 2
    shade = f'<rect x="{width / 2 - tie:.1f}" width="{2 * tie:.1f}" height="{height}"/>'
    label = escape(f"Score gaps of {gaps.metric}, from {-gaps.limit:.3g} to {gaps.limit:.3g}")
    paths = "".join(f'<path class="{side}" d="{path}"/>' for side, path in bars.items() if path)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"{shade if tie else ''}{paths}</svg>"
    )
