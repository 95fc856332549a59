"""Pairs of one's own: generate images of prompts and write them as a pair set, for `pairs=own`.

If interrupted, rerun the command; it resumes. torch is imported only when there is something to
generate.
"""

import shutil
import time
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from rich.console import Console

from conf.ahead import check_later_stages
from conf.job import Job, settings
from data.artifacts.manifest import Manifest
from data.artifacts.progress import progress_bar
from data.artifacts.schemas import Status
from data.distributed import Rank, work_order
from data.storage.paths import is_same_folder
from generate.config import PromptsKind
from generate.image_files import Model, ensure_same_settings, model_at
from generate.model_process import check_folder, check_hub_model
from generate.pair_set.plan import PairPlan, first_seed
from generate.pair_set.progress import ImageCount
from generate.pair_set.shard_writer import declare_complete
from generate.prompts.prompt_set import PromptSet, load_prompts

SECTION = "generate.prompts"
ADVICE = (
    "generate.models takes diffusers folders, hub ids with their commit (`id@commit`), and LoRA "
    "weights for model.path (a folder, or a .safetensors file)"
)
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow")


def main(job: Job) -> None:
    """Finish the run's own pairs, if it has any; a finished set only says so."""
    rank, console, since = Rank.from_environment(), Console(), time.time()
    if job.pairs.kind != "own" or not is_same_folder(job.pairs.root, job.folder / "pairs"):
        if rank.is_first:
            console.print(
                f"nothing to generate: the run's pairs are those of {job.pairs.root}; pairs=own "
                "generates them",
                highlight=False, soft_wrap=True, markup=False,
            )  # fmt: skip
        return
    check_later_stages("generate", job)
    plan = plan_of(job)
    manifest = plan.finished()
    if manifest is None:
        ensure_same_settings(plan.folder, plan.settings)
        generate(plan, rank, console)
        if rank.is_first:
            manifest = declare_complete(plan, provenance(job, plan), since)
    shutil.rmtree(plan.work, ignore_errors=True)
    if rank.is_first and manifest is not None:
        console.print(summary(plan, manifest), highlight=False, soft_wrap=True, markup=False)


def plan_of(job: Job) -> PairPlan:
    """The pair set that a job describes, checked before any model is loaded.

    Raises:
        ValueError: The prompts or a model cannot be used, or a seed is one that models are judged
            with.
    """
    check_seeds(job)
    return PairPlan(
        folder=job.folder / "pairs",
        spec=job.generate,
        models=tuple(models_of(job)),
        prompts=prompts_of(job),
        size=job.generate.size(job.model.resolution),
        seed=job.seed,
    )


def check_seeds(job: Job) -> None:
    """Refuse seeds that models are judged with: noise belongs to a prompt and a seed.

    Raises:
        ValueError: Names both settings.
    """
    first = first_seed(job.generate, job.seed)
    judged = range(job.seed, job.seed + job.evaluate.seeds)
    if first < judged.stop and judged.start < first + job.generate.images:
        raise ValueError(
            f"generate.first_seed={job.generate.first_seed} gives the images seeds from {first} to "
            f"{first + job.generate.images - 1}, and models are judged with {judged.start} to "
            f"{judged.stop - 1} (seed, evaluate.seeds); choose another generate.first_seed"
        )


def models_of(job: Job) -> list[Model]:
    """The models to generate with; without `generate.models`, the run's base."""
    base = base_model(job, "base")
    if not job.generate.models:
        base.check("model.path takes a diffusers folder, or a hub id together with model.revision")
        return [base]
    models = [model_at(base, name, path) for name, path in job.generate.models.items()]
    for model in models:
        model.check(ADVICE)
    return models


def base_model(job: Job, name: str) -> Model:
    """The model of `model.path`, with all that is said of it."""
    spec = job.model
    return Model(
        name=name,
        path=spec.path,
        revision=spec.revision,
        prediction_type=spec.prediction_type,
    )


def prompts_of(job: Job) -> PromptSet:
    """The prompts to generate images for, without those that models are judged on.

    Raises:
        ValueError: There are none, or a file cannot be read.
    """
    spec, judged = job.generate.prompts, job.evaluate.prompts
    for section, prompts in ((SECTION, spec), ("evaluate.prompts", judged)):
        if prompts.kind is PromptsKind.pairs:
            raise ValueError(
                f"{section}.kind=pairs takes prompts from the run's pair set, and pairs=own has "
                f"none before they are generated; give a file of prompts ({section}.path=...)"
            )
    if spec.exclude_trained:
        raise ValueError(
            f"{SECTION}.exclude_trained leaves out prompts of the run's own pairs, which are still "
            "to be generated; leave it out"
        )
    if spec.kind is not PromptsKind.miniature and not spec.path:
        raise ValueError(
            f"{SECTION} names no prompts; give a text file with one prompt a line, as "
            f"{SECTION}.path=prompts.txt, or another set, as prompts@{SECTION}=parti "
            f"{SECTION}.path=PartiPrompts.tsv"
        )
    comparison = load_prompts(replace(judged, exclude_trained=False))
    return load_prompts(spec, section=SECTION, judged=comparison)


def generate(plan: PairPlan, rank: Rank, console: Console) -> None:
    """Generate this rank's images and write its files, then whatever other ranks have not done."""
    for model in plan.models:
        steps = max(plan.spec.steps)
        check_hub_model(model, plan.spec.scheduler, steps, plan.size, "generate")
        assumed = check_folder(model, plan.spec.scheduler, steps, plan.size, "generate")
        if assumed and rank.is_first:
            console.print(assumed, highlight=False, soft_wrap=True, markup=False)
    if rank.is_first:
        console.print(plan.prompts.counts, highlight=False)
        if rank.world_size > plan.num_blocks:
            console.print(
                f"{rank.world_size} processes share {plan.num_blocks} files of pairs; lower "
                "generate.shard_prompts, so that each has work",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    order = work_order(plan.num_blocks, rank)
    if all(plan.shard(block).exists() for block in order):
        return
    from generate.pair_set.image_maker import generate_blocks  # torch, which a finished set skips

    count, shown = ImageCount(plan), console if rank.is_first else None
    with progress_bar("generating images", count.total, count.done, shown):
        generate_blocks(plan, order, rank)


def summary(plan: PairPlan, manifest: Manifest) -> str:
    """What is in the set; the numbers of pairs add up."""
    ok, bad = (manifest.counts.get(status, 0) for status in (Status.OK, Status.NOT_FINITE_IMAGE))
    return (
        f"{len(plan.prompts.prompts)} prompts · {plan.num_images} images · ok {ok} · "
        f"not finite image {bad} · total {manifest.rows} pairs: {plan.folder}"
    )


def provenance(job: Job, plan: PairPlan) -> dict[str, Any]:
    """What is worth knowing of a set but does not decide its rows."""
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "prompts": plan.prompts.counts,
        "models": {
            model.name: {"path": model.path, "revision": model.revision, "adapter": model.adapter}
            for model in plan.models
        },
        "generate": settings(job.generate),
    }
