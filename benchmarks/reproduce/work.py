"""The pieces of a comparison: label in every way, then train, sample and judge each unit.

An interrupted piece resumes when it is done again.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import evaluate.run as judge_program
import generate.run as generate_program
import label.run as label_program
import train.run as train_program
from benchmarks.reproduce.children import Piece
from benchmarks.reproduce.plan import BASE, JUDGE, Plan, Unit
from benchmarks.reproduce.study import Arm, PairSet
from conf.job import settings
from evaluate.judging.distance import measure_denoisers, unmeasured
from evaluate.judging.scores import is_judged
from evaluate.plan import ComparisonPlan
from evaluate.reporting import results
from evaluate.reporting.label_facts import label_facts
from evaluate.steps import (
    check_sample_folder,
    load_model,
    load_panel,
    sample_model,
    score_model,
)
from generate.image_files import Model


def pieces(plan: Plan) -> list[Piece]:
    """Everything to do, each piece with those that it needs."""
    sets = [pairs_piece(plan, pairs) for pairs in plan.pair_sets()]
    return [*sets, *(unit_piece(plan, unit) for unit in plan.units())]


def pairs_piece(plan: Plan, pairs: PairSet) -> Piece:
    """Generate a shared pair set, if it is to be, and label it for every arm that trains on it."""
    log = plan.folder / pairs.name / "log.txt"
    return Piece(pairs.name, log, partial(do_pairs, plan, pairs))


def do_pairs(plan: Plan, pairs: PairSet) -> None:
    """Do the work of `pairs_piece` in this process."""
    arms = [arm for arm in plan.arms if arm.pairs == pairs]
    ways = {
        tuple(plan.fill(arm.overrides, seed)): (arm, seed)
        for arm in arms
        for seed in plan.training_seeds
    }
    jobs = [plan.pairs_job(pairs, arm, seed) for arm, seed in ways.values()]
    if pairs.is_generated:
        generate_program.main(plan.pairs_job(pairs, arms[0], 0))
    for job in {job.vote.name: job for job in jobs}.values():
        label_program.main(job)


def unit_piece(plan: Plan, unit: Unit, where: str = JUDGE) -> Piece:
    """Train (except the base), sample and judge one model."""
    log = plan.folder / (unit.name if unit.arm else where) / "log.txt"
    needs: list[str] = []
    if unit.arm and unit.arm.pairs:
        needs.append(unit.arm.pairs.name)
    if unit.arm and unit.arm.before:
        needs.append(f"{unit.arm.before}-{unit.seed}")
    return Piece(unit.name, log, partial(do_unit, plan, unit, where), frozenset(needs))


def do_unit(plan: Plan, unit: Unit, where: str = JUDGE) -> None:
    """Do the work of `unit_piece` in this process."""
    if unit.arm is not None:
        train_unit(plan, unit, unit.arm)
    judge_unit(plan, unit, where)


def train_unit(plan: Plan, unit: Unit, arm: Arm) -> None:
    """Train the model of an arm, in this process."""
    job = plan.unit_job(unit)
    if arm.pairs:
        for part in ("labels", "latents"):
            link_shared(plan.folder / arm.pairs.name / part, job.folder / part)
    else:
        generate_program.main(job)
        label_program.main(job)
    train_program.main(job)
    for checkpoint in (job.folder / "train").glob("step-*"):
        shutil.rmtree(checkpoint)  # 40 MB each, and no longer needed


def judge_unit(plan: Plan, unit: Unit, where: str) -> None:
    """Sample and judge one model, in this process; with a grid, measure its distance, too."""
    own = plan_of(plan, unit, where)
    model, name = own.models[-1], unit.name
    if not is_judged(own.model_scores(name), own.model_score_settings(name)):
        check_sample_folder(own, model)
        sample_model(own, model, own.images[name], _ignore)
        score_model(own, name, load_panel(own, plan.judge_job(where).metrics), _ignore)
    if plan.grid and name in unmeasured(own)[1]:
        measure_denoisers(own, [name], partial(load_model, own), _ignore)


def link_shared(target: Path, link: Path) -> None:
    """Link a folder of the shared run into another run; the link is relative."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..") / target.relative_to(link.parent.parent))


def plan_of(plan: Plan, unit: Unit, where: str = JUDGE) -> ComparisonPlan:
    """The plan that samples and judges one unit, the last of its models.

    With a grid the base, which distances are measured from, comes before it. All units share the
    folder.
    """
    job = plan.judge_job(where)
    models = [Model(name=BASE, path=job.model.path)]
    if unit.arm is not None:
        policy = plan.folder / unit.name / "train" / "pipeline"
        models = [*(models if plan.grid else ()), Model(name=unit.name, path=str(policy))]
    return judge_program.plan_of(job, models)


def scores_of(plan: Plan, unit: Unit, where: str = JUDGE) -> Path:
    """The file of a unit's scores."""
    job = plan.judge_job(where)
    return job.folder / job.evaluate.folder / "scores" / f"{unit.name}.parquet"


def judged(plan: Plan) -> Mapping[str, Path]:
    """Unit -> its file of scores, if it exists; the unit itself checks its settings."""
    paths = {unit.name: scores_of(plan, unit) for unit in plan.units()}
    return {name: path for name, path in paths.items() if path.exists()}


def decided(plan: Plan) -> dict[str, int]:
    """Arm -> the number of pairs with a winner in its labels (of the first seed)."""
    numbers = {}
    for arm in plan.arms:
        if facts := label_facts(plan.labels(arm)):
            numbers[arm.name] = int(facts["decided"])
    return numbers


def provenance(plan: Plan) -> dict[str, Any]:
    """The code, models, judges and settings that the results were made with."""
    return results.provenance(plan_of(plan, Unit(None, 0)), settings(plan.judge_job()))


def _ignore(number: int) -> None:
    """Show no progress within a piece."""
