"""The label report: one HTML file that carries its plots and images in itself."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from data.artifacts.atomic import write_bytes
from label.analysis.console import SPACE, number, rule_words
from label.analysis.gallery import Gallery
from label.analysis.statistics import Gaps, Study
from label.config import HUMAN

PLOT = (244, 64)
"""Width and height of a histogram, in its own units."""
COLUMNS = {
    "metrics": (
        ("metric", "metric", "text"), ("coverage", "pairs scored", "percent"),
        ("abstains", "abstains", "percent"), ("human", "agrees with people", "bar"),
        ("winner", "agrees with the label", "bar"), ("side_0", "votes for image 0", "percent"),
    ),
    "pairwise": (
        ("metric_a", "metric", "text"), ("metric_b", "and metric", "text"),
        ("pairs", "pairs", "number"), ("agreement", "equal votes", "bar"),
        ("kappa", "Cohen’s kappa", "coefficient"),
        ("spearman", "rank correlation of gaps", "coefficient"),
    ),
    "ties": (
        ("votes", "votes", "text"), ("outcome", "what came of it", "word"),
        ("pairs", "pairs", "share"), ("human", "agrees with people", "bar"),
    ),
    "coalitions": (
        ("ahead", "on one side", "text"), ("behind", "on the other", "text"),
        ("abstain", "abstains", "text"), ("pairs", "pairs", "share"),
        ("human", "people on the first side", "bar"),
    ),
    "without": (
        ("without", "without", "text"), ("changed", "pairs changed", "percent"),
        ("ties_broken", "ties decided", "number"), ("ties_made", "new ties", "number"),
        ("reversed", "winner reversed", "number"), ("human", "majority agrees with people", "bar"),
        ("human_broken", "on the ties decided", "bar"),
    ),
    "groups": (
        ("group", "images", "text"), ("pairs", "pairs", "share"),
        ("decided", "decided", "percent"), ("unanimous", "without a vote against", "percent"),
        ("side_0", "image 0 wins", "percent"), ("human", "agrees with people", "bar"),
    ),
    "generators": (
        ("group", "made by", "text"), ("pairs", "pairs", "share"),
        ("first_wins", "the first wins", "bar"), ("decided", "decided", "percent"),
        ("unanimous", "without a vote against", "percent"),
        ("human", "agrees with people", "bar"),
    ),
    "sides": (
        ("name", "who", "text"), ("side_0", "prefers image 0", "bar"),
        ("interval", "expected of none with a side", "text"), ("verdict", "", "text"),
        ("larger", "prefers the larger image", "bar"),
    ),
    "reasons": (
        ("status", "status", "word"), ("reason", "reason", "long"), ("pairs", "pairs", "number"),
    ),
}  # fmt: skip
"""Table -> its columns: key, heading, and how a value is shown."""


def write_report(
    folder: Path, found: Study, galleries: list[Gallery], facts: Mapping[str, Any]
) -> Path:
    """Write `report.html` beside the labels."""
    template = _environment().get_template("report.html.j2")
    page = template.render(
        name=folder.name,
        study=found,
        headline=headline(found),
        rule=rule_words(found.voting_rule),
        columns=COLUMNS,
        sides=sides(found),
        galleries=galleries,
        kind_of=kind_of(found),
        percent=percent,
        coefficient=coefficient,
        facts=list(flat(facts)),
        now=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    path = folder / "report.html"
    write_bytes(path, page.encode())
    return path


def kind_of(found: Study) -> Callable[[str], str]:
    """What a word of `decided_by` means: `done`, `helped` by the tie rule, `open`, or `failed`."""
    helpers = {HUMAN, f"metric:{found.voting_rule.spec.tie_metric}"}

    def kind(word: str) -> str:
        if word == found.voting_rule.spec.rule.value:
            return "done"
        if word in helpers:
            return "helped"
        return "failed" if word in found.statuses else "open"

    return kind


def headline(found: Study) -> str:
    """What matters most, in a sentence."""
    whole = found.overall
    decided = f"{number(whole['decided'])} of {number(whole['pairs'])} pairs have a winner"
    if whole["human_agreement"] is None:
        return f"{decided}; no human choice stands beside them"
    return f"{decided}; people chose the same in {percent(whole['human_agreement'])}"


def sides(found: Study) -> list[dict[str, Any]]:
    """Who prefers image 0, and by how much more or less than chance; who the larger image.

    Without a side, 95 % of sets as large have shares within 0.98 / sqrt(n) of a half.
    """
    whole = found.overall
    rows = [
        ("label", whole["winner_side_0"], whole["decided"]),
        *found.metrics.select("metric", "side_0", "votes").iter_rows(),
    ]
    if whole["human_choices"]:
        rows.append((HUMAN, whole["human_side_0"], whole["human_choices"]))
    shown = []
    for name, share, count in rows:
        half = 0.98 / sqrt(count) if count else 0.5
        biased = share is not None and abs(share - 0.5) > half
        shown.append(
            {
                "name": name,
                "side_0": share,
                "interval": f"{percent(max(0.0, 0.5 - half))} to {percent(min(1.0, 0.5 + half))}",
                "verdict": f"favours image {int(share < 0.5)}" if biased else "",
                "larger": found.larger[name],
            }
        )
    return shown


# --- words and drawings --------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share in per cent, or a dash where there is nothing to divide by."""
    return "–" if value is None or value != value else f"{100 * value:.1f}{SPACE}%"


def coefficient(value: float | None) -> str:
    """A coefficient of agreement, or a dash."""
    return "–" if value is None or value != value else f"{value:.3f}".replace("-", "−")


def heat(value: float, neutral: float) -> Markup:
    """A table cell's colour: blue above `neutral`, red below, the stronger the farther."""
    if value != value:
        return Markup("")
    far = min(1.0, abs(value - neutral) / (1 - neutral))
    side = "above" if value >= neutral else "below"
    return Markup(f'class="heat {side}" style="--heat:{60 * far:.0f}%"')


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


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as (path, value) lines."""
    if isinstance(value, Mapping):
        return [
            line
            for key, child in value.items()
            for line in flat(child, f"{path}.{key}" if path else str(key))
        ]
    return [(path, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _environment() -> Environment:
    """Templates beside this file; everything that is put in is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": percent, "number": number, "coefficient": coefficient,
        "heat": heat, "histogram": histogram,
        "rows": lambda frame: frame.to_dicts() if isinstance(frame, pl.DataFrame) else frame,
    }  # fmt: skip
    return environment
