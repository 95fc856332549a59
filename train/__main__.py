"""Stage two: `python -m train`, or under torchrun. The same command continues a run."""

import json
import os
import sys
from typing import Any

from conf.job import Job, entry, settings
from data.shards import ShardError, read_manifest, refuse_other_settings
from train.config import WITHOUT_EFFECT, TrainRun, fingerprint


def main(job: Job) -> None:
    """Train, unless it is done; every check that needs no weights comes first."""
    run = describe(job)
    if done(run):
        if os.environ.get("RANK", "0") == "0":
            print(f"training is done: {run.pipeline}")
        return
    from train.run import execute  # torch and the rest take seconds to import

    execute(run)


def describe(job: Job) -> TrainRun:
    """The run that a configuration asks for.

    Raises:
        ShardError: There are no labels.
    """
    labels = job.folder / "labels" / job.vote.name
    manifest = read_manifest(labels, "labels")
    if manifest is None:
        raise ShardError(f"{labels} holds no complete label set; run `make labels` first")
    train = settings(job.train)
    deciding: dict[str, Any] = {
        "seed": job.seed,
        "vote": job.vote.name,
        "labels": manifest.identity,
        "model": {"resolution": job.model.resolution, "fingerprint": fingerprint(job.model)},
        "train": {name: value for name, value in train.items() if name not in WITHOUT_EFFECT},
    }
    return TrainRun(
        folder=job.folder / "train",
        labels=labels,
        pairs=job.pairs,
        model=job.model,
        train=job.train,
        seed=job.seed,
        settings=deciding,
    )


def done(run: TrainRun) -> bool:
    """Whether the result is there.

    Raises:
        ShardError: The folder belongs to a run with other settings.
    """
    config = run.folder / "config.json"
    if config.is_file():
        refuse_other_settings(run.folder, json.loads(config.read_text())["settings"], run.settings)
    return (run.pipeline / "balanceddpo.json").is_file()


if __name__ == "__main__":
    sys.exit(entry(main)())
