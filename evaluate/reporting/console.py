"""The comparison in the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

COLOURS = {"better": "green", "worse": "red", "not shown": "dim"}


def progress(console: Console, *, shown: bool) -> Progress:
    """A bar with counts and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


def print_summary(console: Console, summary: Mapping[str, Any], report: Path) -> None:
    """Win rates, one table a model, one sentence each, and where the images are."""
    for comparison in summary["comparisons"]:
        console.print(_table(summary, comparison))
        console.print(comparison["sentence"])
    console.print(f"report: {report}", soft_wrap=True)


def _table(summary: Mapping[str, Any], comparison: Mapping[str, Any]) -> Table:
    prompts = summary["prompts"]
    table = Table(
        title=f"{comparison['model']} against {comparison['base']} on {prompts['name']} "
        f"({prompts['prompts']} prompts)",
        title_justify="left",
    )
    for name in ("metric", "role"):
        table.add_column(name, no_wrap=True)
    for name in ("win rate", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for rate in comparison["rates"]:
        verdict = rate["verdict"]
        table.add_row(
            rate["metric"],
            rate["role"].replace("_", " "),
            *_numbers(rate["win_rate"]),
            f"[{COLOURS[verdict]}]{verdict}[/]",
        )
    table.add_section()
    table.add_row("average", "voters", *_numbers(comparison["average"]), comparison["balance"])
    return table


def _numbers(estimate: Mapping[str, float]) -> tuple[str, str]:
    return f"{estimate['value']:.1%}", f"{estimate['low']:.1%} to {estimate['high']:.1%}"
