"""Writes what came of the comparison: Parquet, JSON, Markdown, figures, and the page in docs/."""

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

Found = dict[tuple[str, str], Contrast]


def write(console: Console, plan: Plan, docs: Path | None) -> None:
    """Compare all arms that are there; `docs` gets the results when every model is.

    Raises:
        ValueError: Not even the base and one arm are there.
    """
    paths = work.judged(plan)
    if BASE not in paths or len(paths) < 2:
        raise ValueError(
            f"{plan.folder} has no scores of the base and an arm yet; run without --report"
        )
    scores = {name: pl.read_parquet(path) for name, path in paths.items()}
    found = contrasts(plan, scores)
    text = results(plan, found, len(paths))
    folder = plan.folder / "results"
    write_table(folder / "results.parquet", pa.Table.from_pylist(tables.rows(found.values())))
    write_json(folder / "results.json", as_json(plan, found))
    draw(plan, found, folder)
    write_bytes(folder / "results.md", (text + "\n").encode())
    console.print(tables.short(with_base(found), plan.arms))
    console.print(f"results: {folder}", soft_wrap=True)
    if docs is not None and len(paths) == len(list(plan.units())):
        publish(docs, text, draw(plan, found, docs.with_suffix("")))
        console.print(f"page: {docs}", soft_wrap=True)


def contrasts(plan: Plan, scores: Mapping[str, pl.DataFrame]) -> Found:
    """Every arm against the base, and the arms that the claims set against each other."""
    judges = work.plan_of(plan, Unit(None, 0)).judges
    there = {name.rpartition("-")[0] for name in scores if name != BASE}
    wanted = [(arm.name, BASE) for arm in plan.arms]
    wanted += [(arm, other) for arm, others in tables.CLAIMS.values() for other in others]
    resamples = plan.judge_job.evaluate.resamples
    found: Found = {}
    for arm, other in dict.fromkeys(wanted):
        if arm in there and (other in there or other == BASE):
            found[arm, other] = contrast(scores, judges, arm, other, resamples=resamples)
    return found


def with_base(found: Found) -> dict[str, Contrast]:
    """The arms against the base alone."""
    return {arm: one for (arm, other), one in found.items() if other == BASE}


def results(plan: Plan, found: Found, models: int) -> str:
    """The tables with their headings."""
    judges = work.plan_of(plan, Unit(None, 0)).judges
    alone = with_base(found)
    job = plan.judge_job
    return "\n\n".join(
        [
            f"{len(alone)} arms, {plan.seeds} training seeds, {plan.steps} steps of "
            f"{job.train.batch} pairs, {plan.prompts} prompts; {models} of "
            f"{len(list(plan.units()))} models judged; code {code_revision()}.",
            "### Against the base",
            "Win rates in %, ties half; in brackets the 95 % interval over prompts; ▼ shown to be "
            "worse than the base, · no difference shown. The gain is the mean change of the voters'"
            " scores, in standard deviations of the base's: how much is won, not how often.",
            tables.against_base(alone, plan.arms, judges, work.decided(plan)),
            "### Arm against arm",
            tables.claims(found, plan.arms),
            "### Steadiness",
            tables.steadiness(alone, plan.arms),
        ]
    )


def draw(plan: Plan, found: Found, folder: Path) -> list[Path]:
    """The figures, as SVG and PNG; the SVGs' paths."""
    alone = with_base(found)
    drawn = {
        "win-rates": figures.win_rates(alone, plan.arms),
        "snapshots": figures.snapshots(alone),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            paths.append(folder / f"{name}.svg")
            figures.save(figure, paths[-1])
    return paths


def as_json(plan: Plan, found: Found) -> dict[str, Any]:
    """Plan, figures and provenance, for programs."""
    value = {
        "plan": {
            "arms": {arm.name: list(arm.overrides) for arm in plan.arms},
            "seeds": plan.seeds,
            "steps": plan.steps,
            "prompts": plan.prompts,
            "pairs": plan.pairs,
            "extra": list(plan.extra),
        },
        "results": tables.rows(found.values()),
        "by_seed": [
            {"arm": one.arm, "against": one.against, "rates": one.by_seed} for one in found.values()
        ],
        "seconds": measured(plan),
        "provenance": work.provenance(plan),
    }
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain
