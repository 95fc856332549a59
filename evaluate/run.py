"""The judge: sample, score, compare, report. The same command again resumes.

Light at the top on purpose: torch is imported only when there is something to draw or to score.
"""

import json
import re
from typing import Any

from rich.console import Console

from conf.job import Job, settings, unknown
from data.artifacts.atomic import write_json
from data.artifacts.config_diff import differences
from data.artifacts.manifest import code_revision
from data.artifacts.parquet_io import read_settings, read_table, write_table
from data.artifacts.schemas import Role
from data.distributed import Rank
from evaluate.config import EvaluateSpec
from evaluate.judging import is_judged
from evaluate.plan import ComparisonPlan
from evaluate.reporting.console import print_summary
from evaluate.statistics.winrate import Judge
from evaluate.steps import sample_images, score_images
from generate.image_files import Model, adapter_at
from generate.prompts.prompt_set import load_prompts
from label.metrics.registry import score_settings


def main(job: Job) -> None:
    """Compare the models of a job, as this process of those that the launcher started."""
    here = Rank.from_environment()
    run(job, here.rank, here.world_size)


def run(job: Job, rank: int, world: int) -> None:
    """Draw a part of the images; the first process scores and reports. Done is done at once."""
    contest, console = recorded(job) if job.evaluate.scores_only else planned(job), Console()
    summary = finished(contest)
    if summary is None:
        if contest.recorded is None:
            sample_images(contest, console, rank, world)
            if rank:
                return
            score_images(contest, job.metrics, console)
        if rank == 0:
            summary = report(job, contest)
    if summary is not None and rank == 0:
        print_summary(console, summary, contest.folder / "report.html")
        worse = [c["model"] for c in summary["comparisons"] if c["balance"] == "not balanced"]
        if worse and contest.spec.fail_when_worse:
            raise SystemExit(3)


def planned(job: Job) -> ComparisonPlan:
    """The comparison that a job asks for, checked before any model is loaded.

    Raises:
        ValueError: A model, a judge or the prompt set cannot be used.
    """
    models = models_of(job)
    check_models(job.evaluate, [model.name for model in models])
    return plan_of(job, models)


def plan_of(job: Job, models: list[Model]) -> ComparisonPlan:
    """These models on the job's prompts before its judges."""
    judges = judges_of(job)
    specs = {judge.metric: job.metrics[judge.metric] for judge in judges}
    return ComparisonPlan(
        folder=job.folder / job.evaluate.folder,
        spec=job.evaluate,
        models=tuple(models),
        prompts=load_prompts(job.evaluate.prompts, job.pairs),
        judges=tuple(judges),
        metrics=score_settings(specs, job.folder / "scores" / "weights.json"),
        resolution=job.model.resolution,
        seed=job.seed,
    )


def recorded(job: Job) -> ComparisonPlan:
    """The comparison whose scores are there already; asks for no model and no judge's weights.

    Raises:
        ValueError: There are no scores, or not those of the models and judges that are asked for.
    """
    spec, folder = job.evaluate, job.folder / job.evaluate.folder
    path = folder / "scores.parquet"
    if not path.exists():
        raise ValueError(f"{path} is not there; run without evaluate.scores_only to make it")
    made, judges = read_settings(path), judges_of(job)
    if absent := [judge.metric for judge in judges if judge.metric not in made["metrics"]]:
        raise ValueError(
            f"{path} has no scores of {', '.join(absent)}; it has {', '.join(made['metrics'])}: "
            "choose among them with panel.voters, panel.held_out and panel.oracle"
        )
    names = read_table(path, ["model"])["model"].unique().to_pylist()
    check_models(spec, names)
    return ComparisonPlan(
        folder=folder,
        spec=spec,
        models=tuple(Model(name=name, path=made["samples"][name]["model"]) for name in names),
        prompts=load_prompts(spec.prompts, job.pairs),
        judges=tuple(judges),
        metrics=made["metrics"],
        resolution=job.model.resolution,
        seed=job.seed,
        recorded=made,
    )


def judges_of(job: Job) -> list[Judge]:
    """Who judges, voters first."""
    roles = {
        Role.VOTER: job.panel.voters,
        Role.HELD_OUT: job.panel.held_out,
        Role.ORACLE: job.panel.oracle,
    }
    return [
        Judge(name, role, job.metrics[name].tie)
        for role, members in roles.items()
        for name in members
    ]


def check_models(spec: EvaluateSpec, names: list[str]) -> None:
    """Refuse a comparison without a base or without anything to compare it with."""
    if spec.base not in names:
        raise ValueError(unknown(f"model {spec.base!r} in evaluate.base", spec.base, names))
    if len(names) < 2:
        raise ValueError(
            f"evaluate.models has {spec.base!r} alone; name a model to compare it with"
        )


def models_of(job: Job) -> list[Model]:
    """The models to compare; without `evaluate.models`, the run's base and what it trained."""
    if job.evaluate.models:
        models = [model_at(job, name, path) for name, path in job.evaluate.models.items()]
        advice = (
            "evaluate.models takes diffusers folders, hub ids with their commit (`id@commit`), and "
            "LoRA weights for model.path (a folder, or a .safetensors file)"
        )
        for model in models:
            model.check(advice)
        return models
    trained = Model(name="balanceddpo", path=str(job.folder / "train" / "pipeline"))
    trained.check(f"run `make train` with the same settings first (run={job.run})")
    base = Model(name=job.evaluate.base, path=job.model.path, revision=job.model.revision)
    base.check("model.path takes a diffusers folder, or a hub id together with model.revision")
    return [base, trained]


def model_at(job: Job, name: str, value: str) -> Model:
    """A model of `evaluate.models`; LoRA weights are drawn on the job's own base, `model.path`."""
    path, _, revision = value.partition("@")
    adapter = adapter_at(path)
    if adapter is None:
        return Model(name=name, path=path, revision=revision or None)
    base, commit = job.model.path, job.model.revision
    return Model(name=name, path=base, revision=commit, adapter=str(adapter))


def finished(contest: ComparisonPlan) -> dict[str, Any] | None:
    """The summary of a comparison that is complete and of these settings, or None."""
    path = contest.folder / "winrates.json"
    if not path.exists() or not (contest.folder / "report.html").exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    same = not differences(summary["settings"], contest.rate_settings)
    return summary if same and is_judged(contest.scores, contest.score_settings) else None


def report(job: Job, contest: ComparisonPlan) -> dict[str, Any]:
    """Win rates and report from `scores.parquet`; needs no model."""
    import polars as pl

    from evaluate.reporting.label_facts import label_facts
    from evaluate.reporting.report import write_report
    from evaluate.reporting.summary import summarise
    from evaluate.statistics import winrate

    folder, spec = contest.folder, contest.spec
    scores = pl.read_parquet(contest.scores)
    comparisons = [
        winrate.compare(
            scores, contest.judges, spec.base, name, resamples=spec.resamples, seed=contest.seed
        )
        for name in contest.candidates
    ]
    labels = label_facts(job.folder / "labels" / job.vote.name)
    summary = summarise(contest, comparisons, scores, provenance(job, contest), labels)
    (folder / "winrates.json").unlink(missing_ok=True)  # its presence says "complete"
    rates = winrate.table(comparisons, contest.prompts.name)
    write_table(folder / "winrates.parquet", rates, contest.rate_settings)
    write_report(
        folder,
        summary,
        scores,
        journal=job.folder / "train" / "journal.jsonl",
        num_pairs=spec.gallery_pairs,
        seed=contest.seed,
    )
    write_json(folder / "winrates.json", summary)
    return summary


def provenance(job: Job, contest: ComparisonPlan) -> dict[str, Any]:
    """What the result was made with."""
    return {
        "code_revision": code_revision(),
        "models": {
            model.name: {"path": model.path, "revision": model.revision}
            | ({"adapter": model.adapter} if model.adapter else {})
            for model in contest.models
        },
        **(json.loads(judges.read_text()) if (judges := contest.judges_json).exists() else {}),
        "settings": settings(job),
    }


def expanded(argument: str) -> str:
    """`models.ours=PATH` on the command line adds a model; Hydra would want `+evaluate.` before."""
    return re.sub(r"^(?:evaluate\.)?models\.", "++evaluate.models.", argument)
