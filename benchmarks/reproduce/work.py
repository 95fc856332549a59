"""The pieces of the comparison: label in every way, then train, draw and judge each unit.

Every piece may be stopped anywhere; done again, it goes on where it was.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from itertools import starmap
from pathlib import Path
from typing import Any

import evaluate.run as judge_program
import label.run as label_program
import train.run as train_program
from benchmarks.reproduce.children import Piece
from benchmarks.reproduce.plan import JUDGE, SHARED, Plan, Unit
from evaluate.judging import is_judged
from evaluate.plan import ComparisonPlan
from evaluate.reporting.label_facts import label_facts
from evaluate.steps import agree_on, draw_model, load_panel, score_model
from generate.image_files import Model

LIBRARIES = ("label.scoring.shard_scorer", "label.metrics", "train.execute", "generate.sampler")
"""Modules that import torch, DeepSpeed, diffusers, transformers and open_clip."""


def import_all() -> None:
    """Import what the pieces need, so that forked processes have it."""
    from train.distributed.library import library  # DeepSpeed, without what it prints

    for name in LIBRARIES:
        import_module(name)
    library()


def label_piece(plan: Plan) -> Piece:
    """One scoring pass, and the labels of every arm from it."""

    def work() -> None:
        ways = {
            tuple(arm.settings(seed)): (arm, seed)
            for arm in plan.arms
            for seed in range(plan.seeds)
        }
        jobs = {job.vote.name: job for job in starmap(plan.labels_job, ways.values())}
        for job in jobs.values():
            label_program.main(job)

    return Piece("labels", plan.folder / SHARED / "log.txt", work)


def unit_piece(plan: Plan, unit: Unit) -> Piece:
    """Train (unless it is the base), draw and judge one model."""
    log = plan.folder / (unit.name if unit.arm else JUDGE) / "log.txt"
    return Piece(unit.name, log, partial(do_unit, plan, unit))


def do_unit(plan: Plan, unit: Unit) -> None:
    """What `unit_piece` does, in this process."""
    if unit.arm is not None:
        for part in ("labels", "latents"):
            share(plan.folder / SHARED / part, plan.folder / unit.name / part)
        train_program.main(plan.train_job(unit))
    contest = plan_of(plan, unit)
    if not is_judged(contest.model_scores(unit.name), contest.model_score_settings(unit.name)):
        agree_on(contest, contest.models[0])
        draw_model(contest, contest.models[0], contest.images[unit.name], _nothing)
        score_model(contest, unit.name, load_panel(contest, plan.judge_job.metrics), _nothing)
    for checkpoint in (plan.folder / unit.name / "train").glob("step-*"):
        shutil.rmtree(checkpoint)  # 40 MB each, and the pipeline is there


def share(made: Path, link: Path) -> None:
    """Give a run what the shared one has, by a link that survives moving the whole folder."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..") / made.relative_to(link.parent.parent))


def plan_of(plan: Plan, unit: Unit) -> ComparisonPlan:
    """A unit before the judges; its images and scores lie beside those of all others."""
    job = plan.judge_job
    path = job.model.path
    if unit.arm is not None:
        path = str(plan.folder / unit.name / "train" / "pipeline")
    return judge_program.plan_of(job, [Model(name=unit.name, path=path)])


def judged(plan: Plan) -> Mapping[str, Path]:
    """Unit -> its scores, where they are there; whether they are current is the unit's affair."""
    folder = plan.judge_job.folder / plan.judge_job.evaluate.folder / "scores"
    paths = {unit.name: folder / f"{unit.name}.parquet" for unit in plan.units()}
    return {name: path for name, path in paths.items() if path.exists()}


def decided(plan: Plan) -> dict[str, int]:
    """Arm -> pairs that its labels give a winner (of the first seed)."""
    found = {}
    for arm in plan.arms:
        name = plan.labels_job(arm, 0).vote.name
        if facts := label_facts(plan.folder / SHARED / "labels" / name):
            found[arm.name] = int(facts["decided"])
    return found


def provenance(plan: Plan) -> dict[str, Any]:
    """What the figures were made with."""
    contest = plan_of(plan, Unit(None, 0))
    return judge_program.provenance(plan.judge_job, contest)


def _nothing(number: int) -> None:
    """Nobody watches a piece's own progress."""
