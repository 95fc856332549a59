"""The result of a comparison: whether it is there, and how it is made from the scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from data.artifacts.atomic import ShardError, read_json, remove, write_json
from data.artifacts.config_diff import differences
from data.artifacts.manifest import code_revision
from data.artifacts.parquet_io import read_table, write_table
from data.artifacts.schemas import sample_scores
from evaluate.judging.scores import is_judged
from evaluate.plan import ComparisonPlan
from evaluate.reporting.console import print_summary
from evaluate.statistics.winrate import Balance

WITHOUT = "delete it to report without the judges' versions"
"""What to do about a damaged judges.json, which nothing else can make again."""


def finished(plan: ComparisonPlan) -> dict[str, Any] | None:
    """The summary of the comparison if it is complete with these settings, else None."""
    path = plan.folder / "winrates.json"
    if not path.exists() or not (plan.folder / "report.html").exists():
        return None
    try:
        summary = read_json(path, "it is written again")
        same = not differences(summary["settings"], plan.rate_settings) and is_whole(summary, plan)
    except (ShardError, KeyError, TypeError, ValueError, AttributeError):
        return None  # damaged: made again from the scores, without a model
    return summary if same and is_judged(plan.scores, plan.score_settings) else None


def is_whole(summary: Mapping[str, Any], plan: ComparisonPlan) -> bool:
    """Whether a summary has what is printed of it; other errors than False mean no, too."""
    comparisons = summary["comparisons"]
    judges = [judge.metric for judge in plan.judges]
    if [comparison["model"] for comparison in comparisons] != plan.candidates or not all(
        [rate["metric"] for rate in comparison["rates"]] == judges
        and isinstance(comparison["sentence"], str)
        and comparison["balance"] in list(Balance)
        for comparison in comparisons
    ):
        return False
    print_summary(Console(quiet=True), summary, plan.folder)
    return True


def report(
    plan: ComparisonPlan,
    labels: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    journal: Path,
) -> dict[str, Any]:
    """Make win rates and report from `scores.parquet`; needs no model.

    `labels` are what `label_facts` says, `settings` those of the whole job, `journal` is the log of
    the training.
    """
    import polars as pl

    from evaluate.reporting.report import write_report
    from evaluate.reporting.summary import summarise, win_rate_table
    from evaluate.statistics.winrate import compare

    folder, spec = plan.folder, plan.spec
    schema = sample_scores([judge.metric for judge in plan.judges])
    scores = pl.DataFrame(read_table(plan.scores, schema))
    comparisons = [
        compare(scores, plan.judges, spec.base, name, resamples=spec.resamples, seed=plan.seed)
        for name in plan.candidates
    ]
    summary = summarise(plan, comparisons, scores, provenance(plan, settings), labels)
    remove(folder / "winrates.json")  # its presence means "complete"
    rates = win_rate_table(comparisons, plan.prompts.name)
    write_table(folder / "winrates.parquet", rates, plan.rate_settings)
    write_report(
        folder,
        summary,
        scores,
        journal=journal,
        num_pairs=spec.gallery_pairs,
        seed=plan.seed,
    )
    write_json(folder / "winrates.json", summary)
    return summary


def provenance(plan: ComparisonPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The code, models, judges and settings that the result was made with."""
    return {
        "code_revision": code_revision(),
        "models": {
            model.name: {"path": model.path, "revision": model.revision}
            | ({"adapter": model.adapter} if model.adapter else {})
            for model in plan.models
        },
        **(read_json(judges, WITHOUT) if (judges := plan.judges_json).exists() else {}),
        "settings": dict(settings),
    }
