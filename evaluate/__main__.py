"""`python -m evaluate`: draw, score, compare, report. The same command again continues.

Light at the top on purpose: torch is imported only when there is something to draw or to score.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from rich.console import Console

from conf.job import Job, entry, settings, unknown
from data import shards
from data.tables import Role
from evaluate.contest import Contest
from evaluate.judge import Judge, is_judged, judge, write_scores
from evaluate.pictures import Model, adapter_at, agree, missing, share, wait_for
from evaluate.prompts import load_prompts
from evaluate.terminal import progress, tell

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "polars", "scipy")


def main(job: Job) -> None:
    """Compare the models of a job, as this process of those that the launcher started."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    run(job, rank, world)


def run(job: Job, rank: int, world: int) -> None:
    """Draw a part of the pictures; the first process scores and reports. Done is done at once."""
    contest, console = planned(job), Console()
    summary = finished(contest)
    if summary is None:
        draw(contest, console, rank, world)
        if rank:
            return
        everything = [picture for own in contest.pictures.values() for picture in own]
        wait_for(everything, contest.spec.timeout_s)
        score(job, contest, console)
        summary = report(job, contest)
    if rank == 0:
        tell(console, summary, contest.folder / "report.html")
        worse = [c["model"] for c in summary["comparisons"] if c["balance"] == "not balanced"]
        if worse and contest.spec.fail_when_worse:
            raise SystemExit(3)


def planned(job: Job) -> Contest:
    """The comparison that a job asks for, checked before any model is loaded.

    Raises:
        ValueError: A model, a judge or the prompt set cannot be used.
    """
    spec = job.evaluate
    models = models_of(job)
    names = [model.name for model in models]
    if spec.base not in names:
        raise ValueError(unknown(f"model {spec.base!r} in evaluate.base", spec.base, names))
    if len(models) < 2:
        raise ValueError(
            f"evaluate.models has {spec.base!r} alone; name a model to compare it with"
        )
    roles = {
        Role.VOTER: job.panel.voters,
        Role.HELD_OUT: job.panel.held_out,
        Role.ORACLE: job.panel.oracle,
    }
    judges = [
        Judge(name, role, job.metrics[name].tie)
        for role, members in roles.items()
        for name in members
    ]
    return Contest(
        folder=job.folder / spec.folder,
        spec=spec,
        models=tuple(models),
        prompts=load_prompts(spec.prompts),
        judges=tuple(judges),
        metrics={judge.metric: metric_settings(job, judge.metric) for judge in judges},
        resolution=job.model.resolution,
        seed=job.seed,
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


def metric_settings(job: Job, name: str) -> dict[str, Any]:
    """What decides a judge's scores: its settings and the bytes of its weights.

    Raises:
        ValueError: A file of weights is not there, said before anything is drawn.
    """
    spec, files = job.metrics[name], {}
    for key, path in (("weights", spec.weights), ("head", spec.head)):
        if path and Path(path).exists():
            files[key] = shards.sha256_of_folder(Path(path))
        elif path and (key == "head" or not spec.revision):
            raise ValueError(
                f"metrics.{name}.{key}={path} is no file and no folder; a hub id needs "
                f"metrics.{name}.revision, its 40-digit commit"
            )
    value: dict[str, Any] = settings(spec)
    value.pop("tie")  # decides wins, not scores
    return value | {"sha256": files}


def finished(contest: Contest) -> dict[str, Any] | None:
    """The summary of a comparison that is complete and of these settings, or None."""
    path = contest.folder / "winrates.json"
    if not path.exists() or not (contest.folder / "report.html").exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    same = not shards.differences(summary["settings"], contest.rate_settings)
    return summary if same and is_judged(contest.scores, contest.score_settings) else None


def draw(contest: Contest, console: Console, rank: int, world: int) -> None:
    """Draw this process's part of the pictures that are not there yet."""
    for model in contest.models:
        agree(
            contest.samples / model.name,
            contest.sample_settings[model.name],
            first=rank == 0,
            timeout_s=contest.spec.timeout_s,
        )
    own = {name: share(pictures, rank, world) for name, pictures in contest.pictures.items()}
    left = sum(len(missing(pictures)) for pictures in own.values())
    if rank == 0:
        console.print(contest.prompts.counts)
    if not left:
        return
    from evaluate.sample import Generator, device_of, draw_missing

    spec = contest.spec
    device = device_of(spec.device, int(os.environ.get("LOCAL_RANK", "0")))
    total = sum(map(len, own.values()))
    with progress(console, shown=rank == 0) as bar:
        task = bar.add_task("drawing", total=total, completed=total - left)
        for model in contest.models:
            if missing(own[model.name]):
                generator = Generator.load(
                    model,
                    device,
                    scheduler=spec.scheduler,
                    dtype=spec.dtype,
                    resolution=contest.resolution,
                    steps=spec.steps,
                    guidance=spec.guidance,
                )
                drawn: Callable[[int], None] = lambda n: bar.advance(task, n)  # noqa: E731
                draw_missing(generator, own[model.name], spec.batch, drawn)


def score(job: Job, contest: Contest, console: Console) -> None:
    """Score all pictures with all judges, unless that has been done with the same settings."""
    if is_judged(contest.scores, contest.score_settings):
        return
    from evaluate.sample import device_of
    from label.metrics import Panel

    names = [judge.metric for judge in contest.judges]
    device = device_of(contest.spec.device, int(os.environ.get("LOCAL_RANK", "0")))
    panel = Panel.load({name: job.metrics[name] for name in names}, device)
    pictures = [picture for own in contest.pictures.values() for picture in own]
    with progress(console, shown=True) as bar:
        task = bar.add_task("scoring", total=len(pictures))
        scores = judge(
            pictures,
            panel,
            batch=contest.spec.judge_batch,
            workers=contest.spec.judge_workers,
            scored=lambda n: bar.advance(task, n),
        )
    made = {"judges": panel.provenance(), "device": str(device), "packages": versions()}
    shards.write_json(contest.folder / "judges.json", made)
    write_scores(
        contest.scores,
        pictures,
        scores,
        prompts_name=contest.prompts.name,
        settings=contest.score_settings,
    )


def report(job: Job, contest: Contest) -> dict[str, Any]:
    """Win rates and report from `scores.parquet`; needs no model."""
    import polars as pl

    from evaluate import winrate
    from evaluate.report import write_report
    from evaluate.summary import summarise

    folder, spec = contest.folder, contest.spec
    scores = pl.read_parquet(contest.scores)
    comparisons = [
        winrate.compare(
            scores, contest.judges, spec.base, name, resamples=spec.resamples, seed=contest.seed
        )
        for name in contest.challengers
    ]
    summary = summarise(contest, comparisons, scores, provenance(job, contest))
    (folder / "winrates.json").unlink(missing_ok=True)  # its presence says "complete"
    rates = winrate.table(comparisons, contest.prompts.name)
    shards.write_table(folder / "winrates.parquet", rates, contest.rate_settings)
    write_report(
        folder,
        summary,
        scores,
        journal=job.folder / "train" / "journal.jsonl",
        pictures=spec.pictures,
        seed=contest.seed,
    )
    shards.write_json(folder / "winrates.json", summary)
    return summary


def provenance(job: Job, contest: Contest) -> dict[str, Any]:
    """What the result was made with."""
    return {
        "code_revision": shards.code_revision(),
        "models": {
            model.name: {"path": model.path, "revision": model.revision}
            | ({"adapter": model.adapter} if model.adapter else {})
            for model in contest.models
        },
        **json.loads((contest.folder / "judges.json").read_text()),
        "settings": settings(job),
    }


def versions() -> dict[str, str]:
    """The libraries that drew and scored."""
    return {"python": python_version()} | {name: version(name) for name in PACKAGES}


if __name__ == "__main__":
    entry(main)()
