"""The report over all rounds of a run: a table for the terminal, and one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from data.artifacts.atomic import write_bytes
from data.artifacts.html import render
from evaluate.reporting import gallery, plots
from evaluate.reporting.console import COLOURS
from evaluate.reporting.distance import short_distance

TEMPLATE = Path(__file__).parent / "rounds.html.j2"
LABEL_HEADINGS = ("pairs", "decided", "tied", "lead", "equal votes")
Result = Mapping[str, Any]
"""A round as `rounds.json` holds it."""


def print_rounds(console: Console, results: Sequence[Result]) -> None:
    """Print win rates against the base and against the round before, and what the labels were."""
    for key, title in (("against_base", "the base"), ("against_previous", "the round before")):
        shown = [result for result in results if result[key]]
        if shown:
            console.print(_rate_table(f"Against {title}", key, shown))
    table = Table(title="Labels", title_justify="left")
    table.add_column("round")
    for heading in LABEL_HEADINGS:
        table.add_column(heading, justify="right")
    for name, row in label_rows(results):
        table.add_row(name, *row)
    console.print(table)


def write_rounds_report(
    folder: Path,
    results: Sequence[Result],
    images: Sequence[tuple[str, Sequence[tuple[str, Path]]]],
    **words: Any,
) -> Path:
    """Write `rounds.html`; `images` are prompts, each with the images of all models.

    `words` are the template's `run`, `count`, `stopped`, `resolution` and `settings`.
    """
    last, settings = results[-1], words.pop("settings")
    compared = filter(None, (last["against_previous"], last["against_base"]))
    page = render(
        TEMPLATE,
        {"percent": lambda value: f"{value:.1%}", "short_distance": short_distance},
        settings,
        results=results,
        roles=roles_of(last["against_base"]),
        prompts=last["prompts"],
        sentences=[comparison["sentence"] for comparison in compared],
        links={result["round"]: _link(folder, result) for result in results},
        plot=Markup(plots.by_round([result["against_base"] for result in results])),
        label_headings=LABEL_HEADINGS,
        label_rows=label_rows(results),
        cards=[
            (prompt, [(model, gallery.inline(path)) for model, path in shown])
            for prompt, shown in images
        ],
        **words,
    )
    path = folder / "rounds.html"
    write_bytes(path, page)
    return path


def label_rows(results: Sequence[Result]) -> list[tuple[str, tuple[str, ...]]]:
    """Each round's name and its cells under `LABEL_HEADINGS`."""
    rows: list[tuple[str, tuple[str, ...]]] = []
    for result in results:
        labels = result["labels"]
        agreement = labels["agreement"]
        cells = (
            f"{labels['pairs']}",
            f"{labels['decided']}",
            f"{labels['tied']:.1%}",
            f"{labels['margin']:.2f}",
            "–" if agreement is None else f"{agreement:.1%}",
        )
        rows.append((f"round {result['round']}", cells))
    return rows


def roles_of(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Role -> its judges, voters first, so that held-out judges stand apart."""
    roles: dict[str, list[str]] = {}
    for rate in comparison["rates"]:
        roles.setdefault(str(rate["role"]), []).append(rate["metric"])
    return roles


def _rate_table(title: str, key: str, results: Sequence[Result]) -> Table:
    table = Table(title=title, title_justify="left", collapse_padding=True)
    table.add_column("round", no_wrap=True)
    table.add_column("average", justify="right", no_wrap=True)
    with_distance = any(result[key].get("distance") for result in results)
    if with_distance:
        table.add_column("distance", justify="right", no_wrap=True)
    for role, metrics in roles_of(results[0][key]).items():
        for metric in metrics:
            name = metric if role in ("voter", metric) else f"{metric}\n({role.replace('_', ' ')})"
            table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        comparison = result[key]
        rates = [
            f"[{COLOURS[rate['verdict']]}]{_span(rate['win_rate'])}[/]"
            for rate in comparison["rates"]
        ]
        distance = [short_distance(comparison)] if with_distance else []
        table.add_row(comparison["model"], _span(comparison["average"]), *distance, *rates)
    return table


def _span(estimate: Mapping[str, float]) -> str:
    """A win rate in per cent above its interval."""
    low, value, high = (100 * estimate[key] for key in ("low", "value", "high"))
    return f"{value:.1f}\n{low:.0f}-{high:.0f}"


def _link(folder: Path, result: Result) -> str:
    """The path of a round's own report, from the folder of this one."""
    return (Path(result["folder"]) / "report.html").relative_to(folder).as_posix()
