"""What stage one says in the terminal."""

from collections.abc import Mapping

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from data.artifacts.schemas import Status
from label.analysis import agreement
from label.analysis.crowd import Comparison
from label.analysis.statistics import Study
from label.config import HUMAN, Rule, TieRule
from label.voting.label_set import outcomes, statuses
from label.voting.rules import VotingRule

SPACE = "\u202f"
"""Stands between thousands; narrow, and never at the end of a line."""


def number(value: int) -> str:
    """A count with its thousands apart."""
    return f"{value:,}".replace(",", SPACE)


def share(value: float | None) -> str:
    """A rate, or a dash where there is nothing to divide by."""
    return "-" if value is None or value != value else f"{value:.3f}"


def status_line(labelled: pl.DataFrame) -> str:
    """`scored 2 987 · unreadable image 11 · total 3 000`; the parts add up to the total."""
    found = statuses(labelled)
    scored = found.pop(Status.OK.value, 0)
    parts = [f"scored {number(scored)}"]
    parts += [f"{status.replace('_', ' ')} {number(count)}" for status, count in found.items()]
    return " · ".join([*parts, f"total {number(len(labelled))}"])


def outcome_line(labelled: pl.DataFrame) -> str:
    """`decided 2 100 (majority 2 100) · tie 887 · ... · total 3 000`."""
    winners = outcomes(labelled.filter(pl.col("winner").is_not_null()))
    others = outcomes(labelled.filter(pl.col("winner").is_null()))
    how = ", ".join(f"{word} {number(count)}" for word, count in winners.items())
    parts = [f"decided {number(sum(winners.values()))}" + (f" ({how})" if how else "")]
    parts += [f"{word.replace('_', ' ')} {number(count)}" for word, count in others.items()]
    return " · ".join([*parts, f"total {number(len(labelled))}"])


def rule_words(voting_rule: VotingRule) -> str:
    """Who votes, how, and what becomes of ties, in two sentences."""
    spec = voting_rule.spec
    named = {
        voter: "the human label" if voter == HUMAN else voter for voter in voting_rule.everyone
    }
    weights = {voter: f" ({voting_rule.weight(voter)})" if spec.weights else "" for voter in named}
    everyone = ", ".join(word + weights[voter] for voter, word in named.items())
    rule = {
        Rule.majority: f"The majority of {everyone} decides.",
        Rule.unanimous: f"All of {everyone} who do not abstain must agree.",
        Rule.at_least: f"At least {spec.votes} votes of {everyone} decide.",
        Rule.single: f"{spec.metric} alone decides.",
        Rule.human: "The human label alone decides.",
        Rule.random: "A coin decides.",
        Rule.sum: f"The larger sum of the raw scores of {everyone} decides.",
        Rule.zscore_sum: f"The larger sum of the standardised scores of {everyone} decides.",
    }[spec.rule]
    ties = {
        TieRule.drop: "Pairs that it leaves open have no winner.",
        TieRule.human: "What it leaves open, the human label decides.",
        TieRule.metric: f"What it leaves open, {spec.tie_metric} decides.",
    }[spec.tie_rule]
    return f"{rule} {ties}"


def print_summary(console: Console, labelled: pl.DataFrame, folder: str) -> None:
    """Counts that add up, and what the scorers agree on."""
    names, shares, _ = agreement.matrices(agreement.ballots(labelled))
    console.print(status_line(labelled), highlight=False, soft_wrap=True)
    console.print(outcome_line(labelled), highlight=False, soft_wrap=True)
    console.print(agreement_table(names, shares))
    console.print(f"labels: {folder}", highlight=False, soft_wrap=True)


def print_study(console: Console, labelled: pl.DataFrame, found: Study) -> None:
    """All statistics of a label set."""
    console.print(rule_words(found.voting_rule), highlight=False, soft_wrap=True)
    console.print(status_line(labelled), highlight=False, soft_wrap=True)
    console.print(outcome_line(labelled), highlight=False, soft_wrap=True)
    console.print(agreement_table(found.names, found.shares))
    tables = {
        "Why rows could not be scored; N stands for any number": found.reasons,
        "Each metric": found.metrics,
        "Pairs of metrics": found.pairwise,
        "Who votes with whom": found.coalitions,
        "By lead in votes": found.margins,
        "What the rule left open": found.ties,
        "The majority without a voter": found.without,
        "By size": found.sizes,
        "By shape": found.shapes,
        "By generator": found.generators,
    }
    for title, frame in tables.items():
        if frame is not None and not frame.is_empty():
            console.print(frame_table(title, frame))
    if any(value is not None for value in found.larger.values()):
        console.print(mapping_table("Prefers the larger image", found.larger))
    if found.crowd is not None:
        console.print(mapping_table("Dawid-Skene, for comparison", crowd_rows(found.crowd)))
    console.print(mapping_table("The whole set", found.overall))


def crowd_rows(compared: Comparison) -> dict[str, object]:
    """The comparison line by line, in words."""
    return {
        "pairs with a vote": compared.pairs,
        **{f"{m} is right": value for m, value in compared.reliability.items()},
        "same winner as the label": compared.agreement,
        "human agreement of the label": compared.human_label,
        "human agreement of Dawid-Skene": compared.human_crowd,
        "pairs that only Dawid-Skene decides": compared.undecided,
        "human agreement on these": compared.human_undecided,
    }


def agreement_table(names: list[str], shares: np.ndarray) -> Table:
    """The matrix of shares of equal votes."""
    table = Table(title="Share of equal votes, where neither abstains", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for name, row in zip(names, shares.tolist(), strict=True):
        cells = ["·" if name == other else share(v) for other, v in zip(names, row, strict=True)]
        table.add_row(name, *cells)
    return table


def frame_table(title: str, frame: pl.DataFrame) -> Table:
    """Any small frame as a table."""
    table = Table(title=title, title_justify="left")
    for name, dtype in frame.schema.items():
        table.add_column(name.replace("_", " "), justify="right" if dtype.is_numeric() else "left")
    for row in frame.iter_rows():
        table.add_row(*[cell(value) for value in row])
    return table


def mapping_table(title: str, values: Mapping[str, object]) -> Table:
    """Names and numbers as a table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), cell(value))
    return table


def cell(value: object) -> str:
    """One value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return number(value)
    return share(value) if isinstance(value, float) or value is None else str(value)
