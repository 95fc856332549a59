"""Stage two before torch is imported: what is to be trained, and whether that is done."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.ahead import check_later_stages
from conf.job import Job, settings
from data.artifacts.atomic import ShardError, read_json, sha256_of
from data.artifacts.config_diff import refuse_other_settings
from data.artifacts.fingerprints import Fingerprints
from data.artifacts.manifest import read_manifest
from data.distributed import Rank
from data.storage.paths import user_path
from train.config import ModelSpec, Quantize, resumable_fields
from train.identity import TrainRun, checked_start, fingerprint
from train.loader.source_choice import (
    ImageSource,
    LatentsNeeded,
    TextSource,
    choose_source,
    choose_texts,
)
from train.models.base_model import check_buckets, check_settings, find_configs, find_model
from train.models.base_model import describe as describe_model

ABOUT = "pipeline/balanceddpo.json"
"""Where a result's weights come from, below the run's folder; written last."""


def main(job: Job) -> None:
    """Train, unless it is done; every check that needs no weights comes first."""
    if job.train.advise:
        from train.trainer.beta_advice import advise

        folder = job.folder / "train"
        advise(folder, settings_of(folder), job.train.auto_beta.target)
        return
    check_later_stages("train", job)
    run = describe(job)
    if is_done(run):
        if Rank.from_environment().is_first:
            print(f"training is done: {run.pipeline}")
        return
    from train.execute import execute  # torch and the rest take seconds to import

    execute(run)


def check(job: Job) -> None:
    """Check the model, before there are labels; only what is small is fetched of a hub id.

    Raises:
        ValueError: It is not there, or is none that can be trained.
    """
    if finished(job.folder / "train"):
        return
    folder = find_configs(job.model)
    base = describe_model(job.model, folder, whole=folder == user_path(job.model.path))
    check_settings(base, job.model, job.train)
    check_buckets(base, job.model.resolution, job.train.buckets)
    if job.train.lora.start is not None:
        checked_start(job.train.lora.start)


@contextmanager
def exit_at_once() -> Iterator[None]:
    """End a failed process of several without cleaning up, which might wait for the others.

    Its error is printed first. The launcher notices that the process ended, and ends the others.
    """
    try:
        yield
    except BaseException as error:
        if _is_alone():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _is_alone() -> bool:
    """Whether no other process waits for this one, as far as the launcher's variables tell."""
    try:
        return Rank.from_environment().world_size == 1
    except ValueError:
        return True


def describe(job: Job) -> TrainRun:
    """Describe the run of a configuration.

    Raises:
        ShardError: There are no labels, or the latents do not match.
    """
    labels = job.folder / "labels" / job.vote.name
    manifest = read_manifest(labels, "labels")
    if manifest is None:
        raise ShardError(f"{labels} holds no complete label set; run `make labels` first")
    train, folder = settings(job.train), job.folder / "train"
    if job.train.lora.start is not None:
        train["lora"]["start"] = sha256_of(checked_start(job.train.lora.start))
    images, prompts, encoded = sources_of(job, folder)
    resumable = resumable_fields()
    run_identity: dict[str, Any] = {
        "seed": job.seed,
        "vote": job.vote.name,
        "labels": manifest.identity,
        "model": model_identity(job.model),
        "train": {name: value for name, value in train.items() if name not in resumable},
        **encoded,
    }
    return TrainRun(
        folder=folder,
        labels=labels,
        pairs=job.pairs,
        model=job.model,
        train=job.train,
        seed=job.seed,
        latents=images.latents,
        texts=prompts.texts,
        sources=(images.description, prompts.description),
        settings=run_identity,
    )


def model_identity(model: ModelSpec) -> dict[str, Any]:
    """What of the model decides the weights; what is null by default only where it was set."""
    identity: dict[str, Any] = {
        "resolution": model.resolution,
        "fingerprint": fingerprint(model),
    }
    if model.prediction_type is not None:
        identity["prediction_type"] = model.prediction_type.value
    if model.quantize is not Quantize.none:
        identity["quantize"] = model.quantize.value
    for name in ("guidance", "vae_tile"):
        if getattr(model, name) is not None:
            identity[name] = getattr(model, name)
    return identity


def sources_of(job: Job, folder: Path) -> tuple[ImageSource, TextSource, dict[str, Any]]:
    """Where the run's images and encoded prompts come from, and what of that decides its weights.

    A finished run is described by its own settings: its latents may have been deleted.
    """
    begun = settings_of(folder)
    if begun is not None and finished(folder):
        identity = identity_of(begun.get("latents"), begun.get("texts"))
        return ImageSource(None, ""), TextSource(None, ""), identity
    model = find_model(job.model)
    sizes = job.train.buckets.sizes(job.model.resolution)
    need = LatentsNeeded(
        folder=job.folder / "latents",
        model=model,
        resolution=job.model.resolution,
        buckets=sizes if len(sizes) > 1 else (),
        flip=job.train.flip,
    )
    images = choose_source(job.train.latents, need, begun)
    hashes = Fingerprints(job.folder / "scores" / "weights.json")
    prompts = choose_texts(job.train.texts, job.folder / "texts", model, hashes, begun)
    return images, prompts, identity_of(images.settings, prompts.settings)


def identity_of(
    latents: dict[str, Any] | None, texts: dict[str, Any] | None
) -> dict[str, dict[str, Any] | None]:
    """What of latents and texts decides the weights; texts only where they are read."""
    return {"latents": latents} | ({} if texts is None else {"texts": texts})


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Return the settings with which a run was begun; None if there is no run."""
    config = folder / "config.json"
    if config.exists():
        return _recorded(folder, config)
    if finished(folder):
        return _recorded(folder, folder / ABOUT)
    if begun := sorted(path.name for path in folder.glob("step-*")):
        raise ShardError(
            f"{folder} has {begun[0]} but no config.json, which says how it was trained; restore "
            "that file, or delete the folder"
        )
    return None


def _recorded(folder: Path, path: Path) -> dict[str, Any]:
    """The settings of a run in a file of its folder that describes it."""
    cure = f"restore the file, or delete {folder} to train anew"
    settings = read_json(path, cure).get("settings")
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(name), dict | None) for name in ("latents", "texts")
    ):
        raise ShardError(f"{path} has no settings of a run; {cure}")
    return settings


def finished(folder: Path) -> bool:
    """Whether a run has its result."""
    return (folder / ABOUT).exists()


def is_done(run: TrainRun) -> bool:
    """Whether the run has its result.

    Raises:
        ShardError: The folder, or the result in it, belongs to a run with other settings.
    """
    begun = settings_of(run.folder)
    if begun is not None:
        refuse_other_settings(run.folder, begun, run.settings)
    if not finished(run.folder) or (run.train.export.single_file and not run.single_file.exists()):
        return False
    refuse_other_settings(run.pipeline, _recorded(run.folder, run.folder / ABOUT), run.settings)
    return True
