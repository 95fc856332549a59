"""The expensive steps of a comparison: sample missing images, score all, measure distances.

torch is imported only when there is something to do.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from rich.console import Console

from data.artifacts.atomic import write_json
from data.artifacts.parquet_io import read_table, write_table
from data.artifacts.schemas import sample_scores
from data.devices import choose_device
from data.distributed import Rank, num_workers
from data.storage.paths import user_path
from evaluate.config import EvaluateSpec
from evaluate.judging.distance import (
    embedding_metric,
    measure_denoisers,
    measure_images,
    unmeasured,
)
from evaluate.judging.scores import Scorers, is_judged, judge, read_scores, write_scores
from evaluate.plan import ComparisonPlan
from evaluate.reporting.progress import SampledImages, progress
from generate.image_files import (
    Model,
    Sample,
    ensure_same_settings,
    link_same_images,
    missing,
    samples_of_rank,
)
from generate.model_process import check_folder, check_hub_model
from label.config import MetricSpec

if TYPE_CHECKING:
    from generate.sampler import ImageGenerator
    from label.scoring.panel import Panel

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "polars", "scipy")


def sample_images(plan: ComparisonPlan, console: Console, rank: int, world_size: int) -> None:
    """Sample this rank's part of the missing images.

    Rank 0 then samples whatever the other ranks have not sampled yet, whether they are slow or
    dead, so that no image is missing at the end.
    """
    for model in plan.models:
        assumed = check_folder(model, plan.spec.scheduler, plan.spec.steps, plan.size)
        check_sample_folder(plan, model)
        if assumed and rank == 0:
            console.print(assumed, highlight=False, soft_wrap=True, markup=False)
    own = {name: samples_of_rank(images, rank, world_size) for name, images in plan.images.items()}
    if rank == 0:
        console.print(plan.prompts.counts)
    if plan.spec.reuse and any(map(missing, plan.images.values())):
        link_images(plan, console, rank)
    if not any(map(missing, plan.images.values())):
        return
    with progress(console, shown=rank == 0) as bar:
        count = SampledImages(plan.images, bar)
        sample_models(plan, own, count.advance)
        if rank == 0 and world_size > 1:
            # Last images first: the other ranks reach those last
            backwards = {name: images[::-1] for name, images in plan.images.items()}
            sample_models(plan, backwards, count.advance)
        count.finish()


def reused_samples(spec: EvaluateSpec) -> Path:
    """The images of another comparison that this one takes.

    Raises:
        ValueError: There are none; names the setting.
    """
    folder = user_path(spec.reuse, "evaluate.reuse") / "samples"
    if not folder.is_dir():
        raise ValueError(
            f"evaluate.reuse={spec.reuse} is no folder of a comparison ({folder} is missing); give "
            "one, as runs/<run>/evaluate, or leave it out"
        )
    return folder


def link_images(plan: ComparisonPlan, console: Console, rank: int) -> None:
    """Link those missing images that another comparison has."""
    earlier = reused_samples(plan.spec)
    for name, images in plan.images.items():
        number = link_same_images(images, earlier / name, plan.sample_settings[name])
        if number and rank == 0:
            text = f"{number} images of {name} are those of {earlier / name}"
            console.print(text, highlight=False, soft_wrap=True, markup=False)


def check_sample_folder(plan: ComparisonPlan, model: Model) -> None:
    """Refuse a model's folder of images that were made with other settings."""
    ensure_same_settings(plan.samples / model.name, plan.sample_settings[model.name])


def sample_models(
    plan: ComparisonPlan, images: Mapping[str, list[Sample]], advance: Callable[[int], None]
) -> None:
    """Sample what is missing of these images, model by model; all are checked before the first."""
    if any(missing(images[model.name]) for model in plan.models):
        from generate.pipelines import check_model

        for model in plan.models:
            check_hub_model(model, plan.spec.scheduler, plan.spec.steps, plan.size)
            check_model(model)
    for model in plan.models:
        if missing(images[model.name]):
            sample_model(plan, model, images[model.name], advance)


def sample_model(
    plan: ComparisonPlan, model: Model, images: list[Sample], advance: Callable[[int], None]
) -> None:
    """Load one model and sample what is missing of its images."""
    from generate.sampler import sample_missing

    sample_missing(load_model(plan, model), images, plan.spec.batch, advance)


def load_model(plan: ComparisonPlan, model: Model) -> "ImageGenerator":
    """Load one model to the device."""
    from generate.sampler import ImageGenerator

    spec = plan.spec
    return ImageGenerator.load(
        model,
        choose_device("evaluate.device", spec.device, Rank.from_environment()),
        scheduler=spec.scheduler,
        dtype=spec.dtype,
        size=plan.size,
        steps=spec.steps,
        guidance=spec.guidance,
        offload=spec.cpu_offload,
    )


def score_images(
    plan: ComparisonPlan,
    specs: Mapping[str, MetricSpec],
    console: Console,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Score this rank's images with all judges, model by model; existing scores are kept.

    Rank 0 then scores whatever the others have not scored yet, and joins all scores.
    """
    names = [model.name for model in plan.models]
    if is_judged(plan.scores, plan.score_settings):
        return
    todo = [
        name
        for name in names
        if not is_judged(plan.model_scores(name), plan.model_score_settings(name))
    ]
    if todo:
        panel = load_panel(plan, specs, record=rank == 0)
        total = sum(len(plan.images[name]) for name in names)
        done = total - sum(len(plan.images[name]) for name in todo)
        with progress(console, shown=rank == 0) as bar:
            task = bar.add_task("scoring", total=total, completed=done)
            for name in todo if world_size > 1 else ():
                score_share(plan, name, panel, rank, world_size, lambda n: bar.advance(task, n))
            for name in todo if rank == 0 else ():
                score_model(plan, name, panel, lambda n: bar.advance(task, n), world_size)
    if rank == 0:
        schema = sample_scores([judge.metric for judge in plan.judges])
        tables = [read_table(plan.model_scores(name), schema) for name in names]
        write_table(plan.scores, pa.concat_tables(tables), plan.score_settings)


def measure_distances(
    plan: ComparisonPlan, specs: Mapping[str, MetricSpec], console: Console
) -> None:
    """Measure how far each model is from the base, after all images were sampled."""
    images, denoisers = unmeasured(plan)
    if not images and not denoisers:
        return
    with progress(console, shown=True) as bar:
        num_inputs = min(plan.spec.distance_images, len(plan.prompts.prompts))
        total = sum(len(plan.images[name]) for name in images)
        total += num_inputs * (len(denoisers) + 1) if denoisers else 0
        task = bar.add_task("distance", total=total)
        device = choose_device("evaluate.device", plan.spec.device, Rank.from_environment())
        metric = embedding_metric(plan, specs, device) if images and plan.spec.seeds > 1 else None
        for name in images:
            measure_images(plan, name, metric, lambda n: bar.advance(task, n))
        if denoisers:
            load = partial(load_model, plan)
            measure_denoisers(plan, denoisers, load, lambda n: bar.advance(task, n))


def load_panel(
    plan: ComparisonPlan, specs: Mapping[str, MetricSpec], *, record: bool = True
) -> "Panel":
    """Load every judge, and record its weights and the libraries in `judges.json`."""
    from label.scoring.panel import Panel

    device = choose_device("evaluate.device", plan.spec.device, Rank.from_environment())
    panel = Panel.load({judge.metric: specs[judge.metric] for judge in plan.judges}, device)
    if record:
        provenance = {"judges": panel.provenance(), "device": str(device), "packages": versions()}
        write_json(plan.judges_json, provenance)
    return panel


def score_share(
    plan: ComparisonPlan,
    name: str,
    panel: Scorers,
    rank: int,
    world_size: int,
    advance: Callable[[int], None],
) -> None:
    """Score those of a model's images that this rank has sampled, into a file of its own."""
    path = plan.share_scores(name, rank, world_size)
    images = samples_of_rank(plan.images[name], rank, world_size)
    if is_judged(path, plan.model_score_settings(name)):
        advance(len(images))
    elif images:
        write_model_scores(plan, name, path, images, score(plan, name, images, panel, advance))


def score_model(
    plan: ComparisonPlan,
    name: str,
    panel: Scorers,
    advance: Callable[[int], None],
    world_size: int = 1,
) -> None:
    """Score those of a model's images that no rank has scored; write all its scores to one file."""
    images, shares = plan.images[name], plan.share_scores(name, 0, 1).parent
    known: dict[tuple[int, int], list[float]] = {}
    for path in sorted(shares.glob("*.parquet")):
        if is_judged(path, plan.model_score_settings(name)):
            known |= read_scores(path, panel.names)
    own = samples_of_rank(images, 0, world_size) if world_size > 1 else []
    advance(max(0, len(known) - len(own)))  # those of the other ranks
    left = [image for image in images if (image.prompt.id, image.seed) not in known]
    rows = zip(*score(plan, name, left, panel, advance).values(), strict=True) if left else ()
    for image, row in zip(left, rows, strict=True):
        known[image.prompt.id, image.seed] = list(row)
    values = np.array([known[image.prompt.id, image.seed] for image in images], np.float32)
    columns = dict(zip(panel.names, values.T, strict=True))
    write_model_scores(plan, name, plan.model_scores(name), images, columns)
    shutil.rmtree(shares, ignore_errors=True)


def score(
    plan: ComparisonPlan,
    name: str,
    images: list[Sample],
    panel: Scorers,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Every judge's scores of some of a model's images, in batches that follow from all of them."""
    return judge(
        images,
        panel,
        batch=min(plan.spec.judge_batch, len(plan.images[name])),
        workers=num_workers(plan.spec.judge_workers),
        advance=advance,
    )


def write_model_scores(
    plan: ComparisonPlan,
    name: str,
    path: Path,
    images: list[Sample],
    scores: Mapping[str, np.ndarray],
) -> None:
    """Write scores of a model's images with the settings that they depend on."""
    write_scores(
        path,
        images,
        scores,
        folder=plan.folder,
        prompts_name=plan.prompts.name,
        settings=plan.model_score_settings(name),
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that sample and score."""
    return {"python": python_version()} | {name: version(name) for name in PACKAGES}
