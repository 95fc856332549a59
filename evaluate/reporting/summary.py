"""Comparisons as `winrates.json` and `winrates.parquet` hold them: numbers, verdicts, sentences."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl
import pyarrow as pa

from data.artifacts import schemas
from data.artifacts.schemas import Role
from evaluate.plan import ComparisonPlan
from evaluate.reporting.distance import distance_of
from evaluate.statistics.power import detectable
from evaluate.statistics.winrate import Balance, Comparison, Verdict, WinRate, compare

PART_RESAMPLES = 1000
"""Bootstrap resamples of a category: there are many, and no verdict depends on them."""


def summarise(
    plan: ComparisonPlan,
    comparisons: Sequence[Comparison],
    scores: pl.DataFrame,
    provenance: Mapping[str, Any],
    labels: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything known about a comparison, as JSON values; `labels` comes from `label_facts`."""
    summary = {
        "base": plan.spec.base,
        "prompts": prompts(plan),
        "protocol": protocol(plan),
        "comparisons": [
            as_json(comparison)
            | {
                "breakdowns": breakdowns(plan, comparison, scores),
                "distance": distance_of(plan, comparison.model),
            }
            for comparison in comparisons
        ],
        "labels": labels,
        "settings": plan.rate_settings,
        "provenance": dict(provenance),
    }
    plain: dict[str, Any] = json.loads(json.dumps(summary, default=str))
    return plain


def as_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison with its verdicts, as JSON values."""
    return asdict(comparison) | {
        "rates": [_rate(rate) for rate in comparison.rates],
        "balance": comparison.balance,
        "sentence": sentence(comparison),
    }


def sentence(comparison: Comparison) -> str:
    """The result in one sentence."""
    voters = [rate for rate in comparison.rates if rate.role is Role.VOTER]
    better = sum(rate.verdict is Verdict.BETTER for rate in voters)
    worse = [rate.metric for rate in comparison.rates if rate.verdict is Verdict.WORSE]
    if comparison.balance is Balance.NOT_SHOWN:
        return (
            f"No difference between {comparison.model} and {comparison.base} has been shown by any "
            "metric."
        )
    return (
        f"{comparison.model} is better than {comparison.base} on {better} of {len(voters)} voting "
        f"metrics and worse on {', '.join(worse) or 'none'}: {comparison.balance}."
    )


def win_rate_table(comparisons: Sequence[Comparison], prompts_name: str) -> pa.Table:
    """Win rates as rows of `winrates.parquet` (`schemas.WIN_RATES`)."""
    rows = [
        {
            **{
                name: getattr(rate, name) for name in schemas.WIN_RATES.names if hasattr(rate, name)
            },
            "prompts_name": prompts_name,
            "base": comparison.base,
            "model": comparison.model,
            "win_rate": rate.win_rate.value,
            "ci_low": rate.win_rate.low,
            "ci_high": rate.win_rate.high,
        }
        for comparison in comparisons
        for rate in comparison.rates
    ]
    return pa.Table.from_pylist(rows, schema=schemas.WIN_RATES)


def breakdowns(
    plan: ComparisonPlan, comparison: Comparison, scores: pl.DataFrame
) -> list[dict[str, Any]]:
    """The win rates within each category and challenge, if the set has several."""
    tables = []
    for by in ("category", "challenge"):
        members: dict[str, list[int]] = {}
        for prompt in plan.prompts.prompts:
            if part := getattr(prompt, by):
                members.setdefault(part, []).append(prompt.id)
        if len(members) > 1:
            parts = [
                {
                    "name": name,
                    "prompts": len(ids),
                    "rates": _part(plan, comparison, scores, ids),
                }
                for name, ids in members.items()
            ]
            tables.append({"by": by, "parts": parts})
    return tables


def _part(
    plan: ComparisonPlan, comparison: Comparison, scores: pl.DataFrame, ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Win rates on some of the prompts; empty if a judge scored none of them."""
    try:
        part = compare(
            scores.filter(pl.col("prompt_id").is_in(ids)),
            plan.judges,
            comparison.base,
            comparison.model,
            resamples=PART_RESAMPLES,
            seed=plan.seed,
        )
    except ValueError:
        return []
    return [_rate(rate) for rate in part.rates]


def prompts(plan: ComparisonPlan) -> dict[str, Any]:
    """The prompt set, with counts of the rows left out."""
    return {
        "name": plan.prompts.name,
        "prompts": len(plan.prompts.prompts),
        "empty": plan.prompts.empty,
        "repeated": plan.prompts.repeated,
        "trained": plan.prompts.trained,
        "sha256": plan.prompts.sha256,
    }


def protocol(plan: ComparisonPlan) -> dict[str, Any]:
    """How images were sampled and compared."""
    settings = plan.score_settings
    of_base = settings["samples"][plan.spec.base]
    return {
        "seeds": len(settings["seeds"]),
        **{name: of_base[name] for name in ("steps", "guidance", "scheduler", "resolution")},
        "resamples": plan.spec.resamples,
        "detectable": detectable(len(plan.prompts.prompts)),
    }


def _rate(rate: WinRate) -> dict[str, Any]:
    return asdict(rate) | {"verdict": rate.verdict}
