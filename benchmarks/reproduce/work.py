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
from benchmarks.reproduce.plan import JUDGE, Plan, Unit
from benchmarks.reproduce.study import PairSet
from conf.job import settings
from evaluate.judging.scores import is_judged
from evaluate.plan import ComparisonPlan
from evaluate.reporting import results
from evaluate.reporting.label_facts import label_facts
from evaluate.steps import check_sample_folder, load_panel, sample_model, score_model
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
    ways = {tuple(plan.fill(arm.overrides, s)): (arm, s) for arm in arms for s in range(plan.seeds)}
    jobs = [plan.pairs_job(pairs, arm, seed) for arm, seed in ways.values()]
    if pairs.is_generated:
        generate_program.main(plan.pairs_job(pairs, arms[0], 0))
    for job in {job.vote.name: job for job in jobs}.values():
        label_program.main(job)


def unit_piece(plan: Plan, unit: Unit) -> Piece:
    """Train (except the base), sample and judge one model."""
    log = plan.folder / (unit.name if unit.arm else JUDGE) / "log.txt"
    needs: list[str] = []
    if unit.arm and unit.arm.pairs:
        needs.append(unit.arm.pairs.name)
    if unit.arm and unit.arm.before:
        needs.append(f"{unit.arm.before}-{unit.seed}")
    return Piece(unit.name, log, partial(do_unit, plan, unit), frozenset(needs))


def do_unit(plan: Plan, unit: Unit) -> None:
    """Do the work of `unit_piece` in this process."""
    if unit.arm is not None:
        job = plan.unit_job(unit)
        if unit.arm.pairs:
            for part in ("labels", "latents"):
                link_shared(plan.folder / unit.arm.pairs.name / part, job.folder / part)
        else:
            generate_program.main(job)
            label_program.main(job)
        train_program.main(job)
    own = plan_of(plan, unit)
    if not is_judged(own.model_scores(unit.name), own.model_score_settings(unit.name)):
        check_sample_folder(own, own.models[0])
        sample_model(own, own.models[0], own.images[unit.name], _ignore)
        score_model(own, unit.name, load_panel(own, plan.judge_job.metrics), _ignore)
    for checkpoint in (plan.folder / unit.name / "train").glob("step-*"):
        shutil.rmtree(checkpoint)  # 40 MB each, and no longer needed


def link_shared(target: Path, link: Path) -> None:
    """Link a folder of the shared run into another run; the link is relative."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..") / target.relative_to(link.parent.parent))


def plan_of(plan: Plan, unit: Unit) -> ComparisonPlan:
    """The plan that samples and judges one unit; all units share its folder."""
    job = plan.judge_job
    path = job.model.path
    if unit.arm is not None:
        path = str(plan.folder / unit.name / "train" / "pipeline")
    return judge_program.plan_of(job, [Model(name=unit.name, path=path)])


def judged(plan: Plan) -> Mapping[str, Path]:
    """Unit -> its file of scores, if it exists; the unit itself checks its settings."""
    folder = plan.judge_job.folder / plan.judge_job.evaluate.folder / "scores"
    paths = {unit.name: folder / f"{unit.name}.parquet" for unit in plan.units()}
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
    return results.provenance(plan_of(plan, Unit(None, 0)), settings(plan.judge_job))


def _ignore(number: int) -> None:
    """Show no progress within a piece."""
