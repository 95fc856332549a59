"""Compares models: sample, score, compare, report. If interrupted, rerun the command; it resumes.

torch is imported only when there is something to sample or to score.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from conf.job import Job, settings, unknown
from data.artifacts.atomic import ShardError
from data.artifacts.parquet_io import read_settings, read_table
from data.artifacts.schemas import Role, sample_scores
from data.devices import means_gpu
from data.distributed import Rank
from evaluate.config import EvaluateSpec, Unreadable
from evaluate.plan import ComparisonPlan
from evaluate.reporting.console import print_summary
from evaluate.reporting.label_facts import label_facts
from evaluate.reporting.results import finished, report
from evaluate.statistics.winrate import Judge
from evaluate.steps import measure_distances, reused_samples, sample_images, score_images
from generate.image_files import Model, model_at
from generate.model_process import check_folder
from generate.prompts.prompt_set import PromptSet, load_prompts
from generate.run import base_model
from label.metrics.registry import definition_of, resolve_all, score_settings, settle_dtypes

PANEL = {Role.VOTER: "voters", Role.HELD_OUT: "held_out", Role.ORACLE: "oracle"}
"""The setting below `panel` that names the judges of a role."""


def main(job: Job) -> None:
    """Compare the models of a job, as one of the processes that the launcher started."""
    here = Rank.from_environment()
    run(job, here.rank, here.world_size)


def run(job: Job, rank: int, world_size: int) -> None:
    """Sample and score this rank's images; rank 0 also reports. A finished run only prints."""
    on_gpu = not job.evaluate.scores_only and means_gpu(job.evaluate.device)
    job = replace(job, metrics=settle_dtypes(job.metrics, on_gpu=on_gpu))
    plan, console = recorded_plan(job) if job.evaluate.scores_only else new_plan(job), Console()
    summary = finished(plan)
    for line in plan.left_out if rank == 0 else ():
        console.print(f"[yellow]left out:[/] {escape(line)}", highlight=False, soft_wrap=True)
    if summary is None:
        labels = label_facts(job.folder / "labels" / job.vote.name) if rank == 0 else None
        if plan.recorded is None:
            sample_images(plan, console, rank, world_size)
            score_images(plan, job.metrics, console, rank, world_size)
        if rank == 0:
            if plan.recorded is None:
                measure_distances(plan, job.metrics, console)
            summary = report(plan, labels, settings(job), job.folder / "train" / "journal.jsonl")
    if summary is not None and rank == 0:
        print_summary(console, summary, plan.folder / "report.html")
        worse = [c["model"] for c in summary["comparisons"] if c["balance"] == "not balanced"]
        if worse and plan.spec.fail_when_worse:
            raise SystemExit(3)


def check(job: Job) -> None:
    """Check prompts, judges and models but the one that is not trained yet; loads no weight.

    Raises:
        ValueError: One of them cannot be used.
    """
    if job.evaluate.scores_only:
        return
    if job.evaluate.reuse:
        reused_samples(job.evaluate)
    models = models_of(job) if job.evaluate.models else [base_of(job)]
    if job.evaluate.models:
        check_models(job.evaluate, [model.name for model in models])
    size = job.evaluate.size(job.model.resolution)
    for model in models:
        check_folder(model, job.evaluate.scheduler, job.evaluate.steps, size)
    prompts = load_prompts(replace(job.evaluate.prompts, exclude_trained=False), job.pairs)
    judges, _ = readers(job, prompts)
    resolve_all({judge.metric: job.metrics[judge.metric] for judge in judges})


def new_plan(job: Job) -> ComparisonPlan:
    """The comparison that a job describes, checked before any model is loaded.

    Raises:
        ValueError: A model, a judge or the prompt set cannot be used.
    """
    models = models_of(job)
    check_models(job.evaluate, [model.name for model in models])
    return plan_of(job, models)


def plan_of(job: Job, models: list[Model]) -> ComparisonPlan:
    """The comparison of these models on the job's prompts by its judges."""
    prompts = load_prompts(job.evaluate.prompts, job.pairs)
    judges, left_out = readers(job, prompts)
    specs = {judge.metric: job.metrics[judge.metric] for judge in judges}
    return ComparisonPlan(
        folder=job.folder / job.evaluate.folder,
        spec=job.evaluate,
        models=tuple(models),
        prompts=prompts,
        judges=tuple(judges),
        left_out=tuple(left_out),
        metrics=score_settings(specs, job.folder / "scores" / "weights.json"),
        size=job.evaluate.size(job.model.resolution),
        seed=job.seed,
    )


def recorded_plan(job: Job) -> ComparisonPlan:
    """The comparison whose scores exist already; needs no model and no judge's weights.

    Raises:
        ValueError: There are no scores, or none of a model or judge that the job names.
    """
    spec, folder = job.evaluate, job.folder / job.evaluate.folder
    path = folder / "scores.parquet"
    if not path.exists():
        raise ValueError(f"{path} does not exist; run without evaluate.scores_only to make it")
    recorded, judges = recorded_settings(path), judges_of(job)
    if absent := [judge.metric for judge in judges if judge.metric not in recorded["metrics"]]:
        raise ValueError(
            f"{path} has no scores of {', '.join(absent)}; it has "
            f"{', '.join(recorded['metrics'])}: choose among them with panel.voters, "
            "panel.held_out and panel.oracle"
        )
    names = read_table(path, sample_scores([]))["model"].unique().to_pylist()
    check_models(spec, names)
    return ComparisonPlan(
        folder=folder,
        spec=spec,
        models=tuple(Model(name=name, path=recorded["samples"][name]["model"]) for name in names),
        prompts=load_prompts(spec.prompts, job.pairs),
        judges=tuple(judges),
        metrics=recorded["metrics"],
        size=job.evaluate.size(job.model.resolution),
        seed=job.seed,
        recorded=recorded,
    )


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings in the footer of an existing `scores.parquet`.

    Raises:
        ShardError: It was not written by a comparison, or is damaged.
    """
    recorded = read_settings(path)
    samples, metrics = recorded.get("samples"), recorded.get("metrics")
    names = read_table(path, sample_scores([]))["model"].unique().to_pylist()
    if (
        not isinstance(metrics, dict)
        or not isinstance(samples, dict)
        or samples.keys() != {*names}
        or not all(
            isinstance(of_model, dict) and "model" in of_model for of_model in samples.values()
        )
    ):
        raise ShardError(
            f"{path} does not say what it was made with; run without evaluate.scores_only to make "
            "it again"
        )
    return recorded


def judges_of(job: Job) -> list[Judge]:
    """The job's judges, voters first."""
    return [
        Judge(name, role, job.metrics[name].tie)
        for role, members in PANEL.items()
        for name in getattr(job.panel, members)
    ]


def readers(job: Job, prompts: PromptSet) -> tuple[list[Judge], list[str]]:
    """The job's judges that can read every prompt, and a line for each that is left out.

    Raises:
        ValueError: A judge cannot, and the job does not leave it out, or nobody can.
    """
    able, left_out = [], []
    for judge in judges_of(job):
        unreadable = definition_of(judge.metric, job.metrics[judge.metric].kind).unreadable
        reasons = [reason for prompt in prompts.prompts if (reason := unreadable(prompt.text))]
        if not reasons:
            able.append(judge)
            continue
        problem = (
            f"{judge.metric} cannot judge {len(reasons)} of the {len(prompts.prompts)} prompts of "
            f"{prompts.name}: {reasons[0]}"
        )
        if job.evaluate.unreadable is Unreadable.refuse:
            raise ValueError(
                f"{problem}; choose other prompts, leave it out with evaluate.unreadable=leave_out,"
                f" or take it out of panel.{PANEL[judge.role]}"
            )
        left_out.append(problem)
    if not able:
        raise ValueError(f"no judge is left: {'; '.join(left_out)}; choose other prompts or judges")
    return able, left_out


def check_models(spec: EvaluateSpec, names: list[str]) -> None:
    """Refuse a comparison without a base, or without a model to compare with it."""
    if spec.base not in names:
        raise ValueError(unknown(f"model {spec.base!r} in evaluate.base", spec.base, names))
    if len(names) < 2:
        raise ValueError(
            f"evaluate.models has only {spec.base!r}; add a model to compare it with: "
            "models.NAME=PATH"
        )


def models_of(job: Job) -> list[Model]:
    """The models to compare; without `evaluate.models`, the run's base and its trained model."""
    if job.evaluate.models:
        base = base_model(job, job.evaluate.base)
        models = [model_at(base, name, path) for name, path in job.evaluate.models.items()]
        advice = (
            "evaluate.models takes diffusers folders, hub ids with their commit (`id@commit`), and "
            "LoRA weights for model.path (a folder, or a .safetensors file)"
        )
        for model in models:
            model.check(advice)
        return models
    trained = Model(name="balanceddpo", path=str(job.folder / "train" / "pipeline"))
    trained.check(f"run `make train` with the same settings first (run={job.run})")
    return [base_of(job), trained]


def base_of(job: Job) -> Model:
    """The run's base model."""
    base = base_model(job, job.evaluate.base)
    base.check("model.path takes a diffusers folder, or a hub id together with model.revision")
    return base


def expanded(argument: str) -> str:
    """`models.ours=PATH` with the prefix that Hydra needs to add a model."""
    return re.sub(r"^(?:evaluate\.)?models\.", "++evaluate.models.", argument)
