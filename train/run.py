"""Stage two before torch is imported: what is to be trained, and whether that is done."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.job import Job, settings
from data.artifacts.atomic import ShardError
from data.artifacts.config_diff import refuse_other_settings
from data.artifacts.manifest import read_manifest
from data.distributed import Rank
from train.config import WITHOUT_EFFECT
from train.identity import TrainRun, fingerprint
from train.loader.source_choice import LatentsNeeded, choose_source
from train.models.families import find_model


def main(job: Job) -> None:
    """Train, unless it is done; every check that needs no weights comes first."""
    try:
        run = describe(job)
        is_done = done(run)
    except ValueError as error:
        tell_others(error, job.train.silence_s)
        raise
    if is_done:
        if Rank.from_environment().is_first:
            print(f"training is done: {run.pipeline}")
        return
    from train.execute import execute  # torch and the rest take seconds to import

    execute(run)


def tell_others(error: ValueError, silence_s: float) -> None:
    """Let the other processes end, too; they may have found nothing wrong, and would wait."""
    if Rank.from_environment().world_size > 1:
        from train.distributed.watch import JoinError, join

        with suppress(JoinError):
            join(silence_s).fail(error)


def describe(job: Job) -> TrainRun:
    """The run that a configuration asks for.

    Raises:
        ShardError: There are no labels.
    """
    labels = job.folder / "labels" / job.vote.name
    manifest = read_manifest(labels, "labels")
    if manifest is None:
        raise ShardError(f"{labels} holds no complete label set; run `make labels` first")
    train, folder = settings(job.train), job.folder / "train"
    begun = settings_of(folder)
    if begun is not None and finished(folder):
        latents, source = begun.get("latents"), None  # the set may be gone by now
    else:
        need = LatentsNeeded(
            folder=job.folder / "latents",
            model=find_model(job.model),
            resolution=job.model.resolution,
            flip=job.train.flip,
        )
        source = choose_source(job.train.latents, need, begun)
        latents = source.settings
    run_identity: dict[str, Any] = {
        "seed": job.seed,
        "vote": job.vote.name,
        "labels": manifest.identity,
        "model": {"resolution": job.model.resolution, "fingerprint": fingerprint(job.model)},
        "train": {name: value for name, value in train.items() if name not in WITHOUT_EFFECT},
        "latents": latents,
    }
    return TrainRun(
        folder=folder,
        labels=labels,
        pairs=job.pairs,
        model=job.model,
        train=job.train,
        seed=job.seed,
        latents=source.latents if source else None,
        images=source.words if source else "",
        settings=run_identity,
    )


def settings_of(folder: Path) -> dict[str, Any] | None:
    """What a run that is under way, or finished, was begun with; None where there is none."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    found: dict[str, Any] = json.loads(config.read_text())["settings"]
    return found


def finished(folder: Path) -> bool:
    """Whether a result is there."""
    return (folder / "pipeline" / "balanceddpo.json").is_file()


def done(run: TrainRun) -> bool:
    """Whether the result is there.

    Raises:
        ShardError: The folder belongs to a run with other settings.
    """
    begun = settings_of(run.folder)
    if begun is not None:
        refuse_other_settings(run.folder, begun, run.settings)
    return finished(run.folder)
