"""Writes the results of a study in which every arm has its own beta."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from benchmarks.reproduce import grid_figures, grid_tables, work
from benchmarks.reproduce.figures import save
from benchmarks.reproduce.grid_results import Progress
from benchmarks.reproduce.page import publish
from benchmarks.reproduce.plan import Plan, measured
from data.artifacts.atomic import write_bytes, write_json
from data.artifacts.manifest import code_revision
from data.artifacts.parquet_io import write_table


def write(console: Console, plan: Plan, docs: Path | None) -> None:
    """Compare all finished arms; the results go into the page `docs`, if one is given.

    Raises:
        ValueError: No arm has been judged with every beta and then with its own.
    """
    progress = Progress(plan)
    check(progress)
    text, folder = results(progress), plan.folder / "results"
    flat = grid_tables.rows(progress.final.values(), at="own beta")
    flat += grid_tables.rows(progress.near.values(), at="equal distance")
    write_table(folder / "results.parquet", pa.Table.from_pylist(flat))
    write_json(folder / "results.json", as_json(progress, flat))
    write_bytes(folder / "results.md", (text + "\n").encode())
    save_figures(progress, folder)
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"results: {folder}", soft_wrap=True)
    if docs is not None:
        images = save_figures(progress, docs.parent / "reproduction" / plan.study.figures)
        publish(docs, plan.study.mark, text, images)
        console.print(f"page: {docs}", soft_wrap=True)


def check(progress: Progress) -> None:
    """Refuse a study without an arm to report.

    Raises:
        ValueError: No arm has been judged with every beta and then with its own.
    """
    if not progress.arms or not progress.final:
        raise ValueError(
            f"{progress.plan.folder} has no arm yet that was tried with every beta and judged with "
            "its own; run without --report"
        )


def results(progress: Progress) -> str:
    """The tables with their headings."""
    plan = progress.plan
    assert plan.grid is not None
    job = plan.judge_job()
    counts = [len(progress.final_sides(arm)) for arm in progress.arms]
    parts = [
        f"{len(progress.arms)} arms; {len(plan.grid.betas)} betas with training seed 0 and "
        f"{plan.grid.prompts} validation prompts; then {min(counts)} to {max(counts)} of "
        f"{plan.seeds} training seeds with {plan.prompts} test prompts; {plan.steps} steps of "
        f"{job.train.batch} pairs; code {code_revision()}.",
        "### Which beta",
        "The voters' average win rate against the base on validation prompts, in %, and in brackets"
        " the distance from the base, in % of its error. The chosen beta is bold.",
        grid_tables.betas(progress),
        "### Against the base, each arm at its own beta",
        "Win rates in %, ties half; in brackets the 95 % interval over prompts and training seeds. "
        "The gain is the mean change of the voters' scores, in standard deviations of the base's.",
        grid_tables.against_base(progress, work.decided(plan)),
        "### Arm against arm",
        "First with their own betas; then as mixtures of the models of training seed 0, at the "
        "middle of the distances that both have, in % of the base's error. There the interval is "
        "over prompts alone.",
        grid_tables.claims(progress),
        "### Against the base, at the common distance",
        f"{100 * progress.target:.1f} % of the base's error; training seed 0 on validation "
        "prompts, so the interval is over prompts alone.",
        grid_tables.at_equal_distance(progress),
    ]
    return "\n\n".join(parts)


def save_figures(progress: Progress, folder: Path) -> list[Path]:
    """Write the figures as SVG and PNG; returns the paths of the SVGs."""
    assert progress.plan.grid is not None
    shown = tuple(arm for arm in progress.arms if arm.name in progress.plan.grid.shown)
    plots = {"pareto": grid_figures.pareto(progress), "beta": grid_figures.curves(progress, shown)}
    for name, figure in plots.items():
        save(figure, folder / f"{name}.svg")
    return [folder / f"{name}.svg" for name in plots]


def as_json(progress: Progress, flat: list[dict[str, Any]]) -> dict[str, Any]:
    """Plan, choices, results and provenance as JSON values, for programs."""
    plan = progress.plan
    return {
        "plan": {
            "study": plan.study.name,
            "arms": {arm.name: list(arm.overrides) for arm in plan.arms},
            "seeds": list(plan.training_seeds),
            "steps": plan.steps,
            "prompts": plan.prompts,
            "pairs": plan.pairs,
            "settings": list(plan.study.settings),
            "extra": list(plan.extra),
        },
        "betas": progress.betas,
        "validation": {name: _keys(rates) for name, rates in progress.rates.items()},
        "distances": {name: _keys(values) for name, values in progress.distances.items()},
        "common_distance": progress.target,
        "results": flat,
        "seconds": measured(plan),
        "provenance": work.provenance(plan),
    }


def _keys(values: dict[float, float]) -> dict[str, float]:
    return {f"{beta:g}": value for beta, value in values.items()}
