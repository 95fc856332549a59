"""`python -m benchmarks.reproduce` (`make reproduce`): the paper's comparison, in miniature.

`--study own` compares pairs that a model generates for itself instead, `--study own_beta` votes,
references and objectives, each at its own best beta, `--study flow` a flow-matching model.

If interrupted, rerun the same command; it resumes. See docs/reproduction.md.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks.reproduce import best, children, flow, own, own_beta, paper
from benchmarks.reproduce.page import check_page
from benchmarks.reproduce.plan import Plan, Unit, estimate, note_seconds

STUDIES = {
    study.name: study for study in (paper.STUDY, own.STUDY, own_beta.STUDY, best.STUDY, flow.STUDY)
}
SHORT_S = 5.0
"""CPU time below which a piece had nothing left to do."""
QUICK = {"seeds": 1, "steps": 4, "prompts": 6}
QUICK_EXTRA = ("train.batch=8", "train.micro_batch=8", "train.reference.every=2", "train.warmup=1",
               "evaluate.steps=2", "evaluate.resamples=200", "generate.steps=2")  # fmt: skip


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line; `--study` and `--quick` change the defaults."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--study", choices=STUDIES, default="paper", help="what is compared")
    first.add_argument("--quick", action="store_true", help="two arms, a few steps: does it work?")
    known, _ = first.parse_known_args(words)
    study, quick = STUDIES[known.study], known.quick
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, parents=[first]
    )
    add = parser.add_argument
    default = QUICK if quick else {name: getattr(study, name) for name in QUICK}
    folder = study.folder.with_name(f"{study.folder.name}-quick") if quick else study.folder
    add("--folder", type=Path, default=folder)
    every = [arm.name for arm in study.arms]
    add("--arms", nargs="+", default=study.quick_arms if quick else every,
        help=f"of {', '.join(every)}")  # fmt: skip
    add("--seeds", type=int, default=default["seeds"], help="trainings of each arm")
    add("--steps", type=int, default=default["steps"], help="optimizer steps of a round")
    add("--prompts", type=int, default=default["prompts"], help="held-out prompts")
    add("--pairs", type=int, default=study.quick_pairs if quick else study.pairs,
        help="pairs of a round")  # fmt: skip
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes side by side")
    add(
        "--docs",
        type=Path,
        help=f"page to write the results into; {study.page} when all arms are run",
    )
    add("--plan", action="store_true", help="only print what would be done")
    add("--report", action="store_true", help="only compare the models that are finished")
    return parser.parse_args(words)


def plan_of(options: argparse.Namespace) -> Plan:
    """The comparison that a command line describes.

    Raises:
        ValueError: An arm is unknown, one of its settings is invalid, such as snapshots that never
            happen within the steps, or there are not enough prompts for the pairs.
    """
    study, grid = STUDIES[options.study], None
    if study.grid:
        quick = replace(study.grid, betas=study.grid.quick_betas, prompts=QUICK["prompts"])
        grid = quick if options.quick else study.grid
    plan = Plan(
        study=study,
        folder=options.folder,
        arms=study.named(options.arms),
        seeds=options.seeds,
        steps=options.steps,
        prompts=options.prompts,
        pairs=options.pairs,
        grid=grid,
        extra=QUICK_EXTRA if options.quick else (),
    )
    plan.check()
    for arm in plan.arms:
        plan.unit_job(Unit(arm, 0))  # refuses invalid settings before anything runs
    return plan


def main(words: list[str]) -> int:
    """Run what is missing, then compare; returns 1 when a piece failed."""
    options, console = arguments(words), Console(highlight=False)
    plan = plan_of(options)
    whole = plan.arms == plan.study.arms and plan.seeds >= plan.study.seeds and not options.quick
    if (docs := options.docs or (plan.study.page if whole else None)) is not None:
        check_page(docs, plan.study.mark)
    from benchmarks.reproduce import grid, work

    program = grid if plan.grid else work
    show(console, plan, set(program.judged(plan)), options.jobs)
    if options.plan:
        return 0
    if not options.report:
        # Read when torch is imported. One thread per process gives the same weights on any number
        # of cores, and two processes with one thread each are faster than one process with two.
        os.environ["OMP_NUM_THREADS"] = "1"
        if not do(console, plan, program.pieces(plan), options.jobs):
            return 1
    from benchmarks.reproduce import grid_report, report

    (grid_report if plan.grid else report).write(console, plan, docs)
    return 0


def show(console: Console, plan: Plan, done: set[str], jobs: int) -> None:
    """Print the plan and an estimate of its duration."""
    table = Table(title="arms", title_justify="left")
    for name in ("arm", "compared by", "settings"):
        table.add_column(name)
    for arm in plan.arms:
        table.add_row(arm.title, arm.group, " ".join(plan.fill(arm.overrides)))
    console.print(table)
    if plan.extra:
        console.print(f"in every run: {' '.join(plan.extra)}")
    models, minutes = len(list(plan.units())), estimate(plan, done, jobs) / 60
    if plan.grid:
        console.print(
            f"beta of each arm: of {', '.join(f'{beta:g}' for beta in plan.grid.betas)}, on "
            f"{plan.grid.prompts} validation prompts"
        )
    console.print(
        f"{len(plan.arms)} arms x {plan.seeds} seeds: {models - 1} trainings of {plan.steps} "
        f"steps; with the base, {models} models sample {plan.prompts} prompts each",
        f"{len(done)} of {models} models are finished; the rest takes about {minutes:.0f} min with "
        f"{jobs} processes · {plan.folder}",
        sep="\n",
    )


def do(console: Console, plan: Plan, pieces: list[children.Piece], jobs: int) -> bool:
    """Do all pieces with a progress bar; False, after showing the logs, when a piece failed."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               "{task.fields[left]}")  # fmt: skip
    done: dict[str, children.Finished] = {}
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("pair sets and models", total=len(pieces), left="")
        for end in children.run(pieces, jobs):
            done[end.piece.name] = end
            if not end.failed and end.seconds > SHORT_S:
                note_seconds(plan, end.piece.name, end.seconds)
            left = f"about {estimate(plan, set(done), jobs) / 60:.0f} min left"
            bar.update(task, completed=len(done), left=left)
    failed = [end.piece for end in done.values() if end.failed]
    for piece in failed:
        tail = "\n".join(piece.log.read_text().splitlines()[-15:])
        console.print(f"{piece.name} failed; {piece.log} ends:\n{tail}", markup=False)
    if waiting := [piece.name for piece in pieces if piece.name not in done]:
        console.print(f"not started, because they need it: {', '.join(waiting)}")
    if failed:
        console.print("rerun the same command to resume")
    return not failed


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; rerun the same command to resume")
