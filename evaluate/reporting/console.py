"""Prints a comparison to the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evaluate.reporting.distance import distance_sentence

COLOURS = {"better": "green", "worse": "red", "not shown": "dim"}


def print_summary(console: Console, summary: Mapping[str, Any], report: Path) -> None:
    """Print a table of win rates and a sentence for each model, and the report's path."""
    for comparison in summary["comparisons"]:
        console.print(_table(summary, comparison))
        console.print(comparison["sentence"])
        if sentence := distance_sentence(comparison):
            console.print(sentence, highlight=False)
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
