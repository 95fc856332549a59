"""Comparisons as `winrates.json` holds them: numbers, verdicts, and a sentence for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from data.artifacts.schemas import Role
from evaluate.plan import ComparisonPlan
from evaluate.statistics.power import detectable
from evaluate.statistics.winrate import Balance, Comparison, Verdict, WinRate, compare

PART_RESAMPLES = 1000
"""Bootstrap resamples of a category: many small intervals that nothing is decided by."""


def summarise(
    contest: ComparisonPlan,
    comparisons: Sequence[Comparison],
    scores: pl.DataFrame,
    provenance: Mapping[str, Any],
    labels: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that is known of a comparison, as JSON values; `labels` as in `label_facts`."""
    summary = {
        "base": contest.spec.base,
        "prompts": prompts(contest),
        "protocol": protocol(contest),
        "comparisons": [
            as_json(comparison) | {"breakdowns": breakdowns(contest, comparison, scores)}
            for comparison in comparisons
        ],
        "labels": labels,
        "settings": contest.rate_settings,
        "provenance": dict(provenance),
    }
    plain: dict[str, Any] = json.loads(json.dumps(summary, default=str))
    return plain


def as_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison with its verdicts."""
    return asdict(comparison) | {
        "rates": [_rate(rate) for rate in comparison.rates],
        "balance": comparison.balance,
        "sentence": sentence(comparison),
    }


def sentence(comparison: Comparison) -> str:
    """What has been shown, in one sentence."""
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


def breakdowns(
    contest: ComparisonPlan, comparison: Comparison, scores: pl.DataFrame
) -> list[dict[str, Any]]:
    """The same win rates within each category and each challenge, where the set has several."""
    found = []
    for by in ("category", "challenge"):
        members: dict[str, list[int]] = {}
        for prompt in contest.prompts.prompts:
            if part := getattr(prompt, by):
                members.setdefault(part, []).append(prompt.id)
        if len(members) > 1:
            parts = [
                {
                    "name": name,
                    "prompts": len(ids),
                    "rates": _part(contest, comparison, scores, ids),
                }
                for name, ids in members.items()
            ]
            found.append({"by": by, "parts": parts})
    return found


def _part(
    contest: ComparisonPlan, comparison: Comparison, scores: pl.DataFrame, ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Win rates on some prompts; none where a judge scored nothing there."""
    try:
        part = compare(
            scores.filter(pl.col("prompt_id").is_in(ids)),
            contest.judges,
            comparison.base,
            comparison.model,
            resamples=PART_RESAMPLES,
            seed=contest.seed,
        )
    except ValueError:
        return []
    return [_rate(rate) for rate in part.rates]


def prompts(contest: ComparisonPlan) -> dict[str, Any]:
    """The prompt set, and what was left out of it."""
    return {
        "name": contest.prompts.name,
        "prompts": len(contest.prompts.prompts),
        "empty": contest.prompts.empty,
        "repeated": contest.prompts.repeated,
        "trained": contest.prompts.trained,
        "sha256": contest.prompts.sha256,
    }


def protocol(contest: ComparisonPlan) -> dict[str, Any]:
    """How images were drawn and compared."""
    made = contest.score_settings
    drawn = made["samples"][contest.spec.base]
    shown = ("steps", "guidance", "scheduler", "resolution")
    return {
        "seeds": len(made["seeds"]),
        **{name: drawn[name] for name in shown},
        "resamples": contest.spec.resamples,
        "detectable": detectable(len(contest.prompts.prompts)),
    }


def _rate(rate: WinRate) -> dict[str, Any]:
    return asdict(rate) | {"verdict": rate.verdict}
