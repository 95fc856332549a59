"""Writes the results: Parquet, JSON, Markdown, figures, and the page in docs/."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from rich.console import Console

from benchmarks.reproduce import figures, tables, work
from benchmarks.reproduce.page import publish
from benchmarks.reproduce.plan import BASE, Plan, Unit, measured
from benchmarks.reproduce.results import Contrast, contrast
from data.artifacts.atomic import write_bytes, write_json
from data.artifacts.manifest import code_revision
from data.artifacts.parquet_io import write_table

Contrasts = dict[tuple[str, str], Contrast]


def write(console: Console, plan: Plan, docs: Path | None) -> None:
    """Compare all finished arms; the results go into the page `docs` when all are finished.

    Raises:
        ValueError: The base, or every arm, is missing.
    """
    paths = work.judged(plan)
    if BASE not in paths or len(paths) < 2:
        raise ValueError(
            f"{plan.folder} has no scores of the base and of an arm yet; run without --report"
        )
    scores = {name: pl.read_parquet(path) for name, path in paths.items()}
    contrasts = compare_arms(plan, scores)
    text = results(plan, contrasts, len(paths))
    folder = plan.folder / "results"
    write_table(folder / "results.parquet", pa.Table.from_pylist(tables.rows(contrasts.values())))
    write_json(folder / "results.json", as_json(plan, contrasts))
    save_figures(plan, contrasts, folder)
    write_bytes(folder / "results.md", (text + "\n").encode())
    console.print(tables.short(with_base(contrasts), plan.arms))
    console.print(f"results: {folder}", soft_wrap=True)
    if docs is not None and len(paths) == len(list(plan.units())):
        images = save_figures(plan, contrasts, docs.parent / "reproduction" / plan.study.figures)
        publish(docs, plan.study.mark, text, images)
        console.print(f"page: {docs}", soft_wrap=True)


def compare_arms(plan: Plan, scores: Mapping[str, pl.DataFrame]) -> Contrasts:
    """Compare every arm with the base, and the arms that the claims compare."""
    judges = work.plan_of(plan, Unit(None, 0)).judges
    finished = {name.rpartition("-")[0] for name in scores if name != BASE}
    wanted = [(arm.name, BASE) for arm in plan.arms]
    wanted += [(arm, other) for arm, others in plan.study.claims.values() for other in others]
    resamples = plan.judge_job().evaluate.resamples
    contrasts: Contrasts = {}
    for arm, other in dict.fromkeys(wanted):
        if arm in finished and (other in finished or other == BASE):
            contrasts[arm, other] = contrast(scores, judges, arm, other, resamples=resamples)
    return contrasts


def with_base(contrasts: Contrasts) -> dict[str, Contrast]:
    """The contrasts with the base, by arm."""
    return {arm: contrast for (arm, other), contrast in contrasts.items() if other == BASE}


def results(plan: Plan, contrasts: Contrasts, models: int) -> str:
    """The tables with their headings."""
    judges = work.plan_of(plan, Unit(None, 0)).judges
    alone = with_base(contrasts)
    job = plan.judge_job()
    parts = [
        f"{len(alone)} arms, {plan.seeds} training seeds, {plan.steps} steps of "
        f"{job.train.batch} pairs, {plan.prompts} prompts; {models} of "
        f"{len(list(plan.units()))} models judged; code {code_revision()}.",
        "### Against the base",
        "Win rates in %, ties half; in brackets the 95 % interval over prompts; ▼ shown to be "
        "worse than the base, · no difference shown. The gain is the mean change of the voters'"
        " scores, in standard deviations of the base's: how much is won, not how often.",
        tables.against_base(alone, plan.arms, judges, work.decided(plan)),
        "### Arm against arm",
        tables.claims(contrasts, plan.study),
    ]
    if steady := [arm for arm in plan.arms if arm.name in plan.study.steady]:
        parts += ["### Steadiness", tables.steadiness(alone, steady)]
    return "\n\n".join(parts)


def save_figures(plan: Plan, contrasts: Contrasts, folder: Path) -> list[Path]:
    """Write the figures as SVG and PNG; returns the paths of the SVGs."""
    alone = with_base(contrasts)
    plots = {
        "win-rates": figures.win_rates(alone, plan.arms),
        "snapshots": figures.snapshots(alone),
    }
    paths = []
    for name, figure in plots.items():
        if figure is not None:
            paths.append(folder / f"{name}.svg")
            figures.save(figure, paths[-1])
    return paths


def as_json(plan: Plan, contrasts: Contrasts) -> dict[str, Any]:
    """Plan, results and provenance as JSON values, for programs."""
    value = {
        "plan": {
            "study": plan.study.name,
            "arms": {arm.name: list(arm.overrides) for arm in plan.arms},
            "seeds": plan.seeds,
            "steps": plan.steps,
            "prompts": plan.prompts,
            "pairs": plan.pairs,
            "extra": list(plan.extra),
        },
        "results": tables.rows(contrasts.values()),
        "by_seed": [
            {"arm": contrast.arm, "against": contrast.against, "rates": contrast.by_seed}
            for contrast in contrasts.values()
        ],
        "seconds": measured(plan),
        "provenance": work.provenance(plan),
    }
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain
