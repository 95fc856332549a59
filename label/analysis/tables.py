"""Tables for the terminal and the page: every column is described once, in `COLUMNS`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import polars as pl

SPACE = "\u202f"
"""Separates thousands; narrow, and never at the end of a line."""
NONE = "–"
"""Stands where there is no value."""

Kind = Literal["text", "words", "number", "part", "percent", "bar", "heat"]
"""How a value is shown. `words` is text with spaces for underscores, `part` a number of pairs with
a bar of its fraction of the table's; `percent`, `bar` and `heat` are fractions: plain, with a bar,
and coloured by their distance from a half."""
COLUMNS: Mapping[str, tuple[str, Kind]] = {
    "status": ("status", "words"), "outcome": ("what came of it", "words"),
    "pairs": ("pairs", "part"), "margin": ("lead", "text"),
    "ahead": ("on one side", "text"), "behind": ("on the other", "text"),
    "abstain": ("abstains", "text"), "human_ahead": ("people on the first side", "bar"),
    "coverage": ("pairs covered", "percent"), "abstains": ("abstains", "percent"),
    "side_0": ("votes for image 0", "percent"), "human": ("agrees with people", "bar"),
    "label": ("agrees with the label", "bar"), "flips": ("people chose the other image", "bar"),
    "ties_broken": ("ties decided", "number"), "ties_made": ("new ties", "number"),
    "reversed": ("winner reversed", "number"),
    "human_broken": ("on the ties decided", "bar"), "first_wins": ("the first wins", "bar"),
    "decided": ("decided", "percent"), "unanimous": ("without a vote against", "percent"),
}  # fmt: skip
"""Column -> its heading, and how its values are shown; others are text under their own name."""


class Cell(NamedTuple):
    """A value of a table, as it is shown."""

    kind: Kind
    text: str
    fraction: float | None = None
    """In [0, 1]: the length of the bar, or what the colour stands for."""


@dataclass(frozen=True, slots=True)
class Table:
    """A small frame with a title."""

    title: str
    frame: pl.DataFrame
    columns: Mapping[str, tuple[str, Kind]] = field(default_factory=lambda: COLUMNS)

    def headings(self) -> list[tuple[str, Kind]]:
        """Heading and kind of each column."""
        return [self.columns.get(name, (name, "text")) for name in self.frame.columns]

    def rows(self) -> list[list[Cell]]:
        """The cells, row by row."""
        kinds = [kind for _, kind in self.headings()]
        total = float(self.frame["pairs"].sum()) if "pairs" in self.frame.columns else 0.0
        return [
            [_cell(kind, value, total) for kind, value in zip(kinds, row, strict=True)]
            for row in self.frame.iter_rows()
        ]


def matrix(title: str, frame: pl.DataFrame) -> Table:
    """A table of fractions whose first column names the rows."""
    first, *names = frame.columns
    return Table(title, frame, {first: ("", "text"), **{name: (name, "heat") for name in names}})


def number(value: int) -> str:
    """A count with its thousands apart."""
    return f"{value:,}".replace(",", SPACE)


def percent(value: float | None) -> str:
    """A fraction in per cent, or a dash."""
    return NONE if value is None else f"{100 * value:.1f}{SPACE}%"


def coefficient(value: float | None) -> str:
    """A coefficient of agreement, or a dash."""
    return NONE if value is None else f"{value:.3f}".replace("-", "−")


def _cell(kind: Kind, value: Any, total: float) -> Cell:
    if value is None or value == "":
        return Cell(kind, NONE)
    match kind:
        case "text":
            return Cell(kind, str(value))
        case "words":
            return Cell(kind, value.replace("_", " "))
        case "number":
            return Cell(kind, number(value))
        case "part":
            return Cell(kind, number(value), value / total)
    return Cell(kind, percent(value), value)
