"""Terminal output of stage one."""

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from data.artifacts.schemas import Status
from label.analysis.agreement import ballots
from label.analysis.statistics import Statistics, agreement_table
from label.analysis.tables import Table, coefficient, number
from label.config import HUMAN, Rule, Select, TieRule
from label.voting.label_set import outcomes, statuses
from label.voting.rules import VotingRule

SELECTION = {
    Select.all: "",
    Select.extremes: "Of each prompt's pairs only the one between the images with most and fewest "
    "wins keeps its winner.",
}
"""What is said of `vote.select`."""


def status_line(labelled: pl.DataFrame) -> str:
    """`scored 2 987 · unreadable image 11 · total 3 000`; the parts add up to the total."""
    counts = statuses(labelled)
    parts = [f"scored {number(counts.pop(Status.OK.value, 0))}"]
    parts += [f"{status.replace('_', ' ')} {number(count)}" for status, count in counts.items()]
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
    """Who votes, how, what becomes of ties, and which pairs are selected, in sentences."""
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
    return " ".join(filter(None, [rule, ties, SELECTION[spec.select]]))


def print_summary(console: Console, labelled: pl.DataFrame, folder: str) -> None:
    """Print counts that add up, and how often the voters agree."""
    say(console, status_line(labelled), outcome_line(labelled))
    console.print(rich_table(agreement_table(ballots(labelled))))
    say(console, f"labels: {folder}")


def print_statistics(console: Console, labelled: pl.DataFrame, statistics: Statistics) -> None:
    """Print all statistics of a label set."""
    rule = rule_words(statistics.voting_rule)
    say(console, rule, status_line(labelled), outcome_line(labelled))
    for table in statistics.tables.values():
        console.print(rich_table(table))
    say(console, f"Krippendorff's alpha of the metrics: {coefficient(statistics.alpha)}")


def say(console: Console, *lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def rich_table(table: Table) -> RichTable:
    """A table for the terminal."""
    shown = RichTable(title=table.title, title_justify="left")
    for heading, kind in table.headings():
        shown.add_column(heading, justify="left" if kind in ("text", "words") else "right")
    for row in table.rows():
        shown.add_row(*(escape(cell.text) for cell in row))
    return shown
