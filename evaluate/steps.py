"""The two expensive steps of a comparison: sample the missing images, then score all images.

torch is imported only when there is something to do.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from platform import python_version
from typing import TYPE_CHECKING

import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data.artifacts.atomic import write_json
from data.artifacts.parquet_io import read_table, write_table
from data.devices import choose_device
from data.distributed import Rank, num_workers
from evaluate.judging import Scorers, is_judged, judge, write_scores
from evaluate.plan import ComparisonPlan
from generate.image_files import (
    Model,
    Sample,
    ensure_same_settings,
    missing,
    samples_of_rank,
)
from label.config import MetricSpec

if TYPE_CHECKING:
    from label.scoring.panel import Panel

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "polars", "scipy")


def sample_images(plan: ComparisonPlan, console: Console, rank: int, world_size: int) -> None:
    """Sample this rank's part of the missing images.

    Rank 0 then samples whatever the other ranks have not sampled yet, whether they are slow or
    dead, so that no image is missing at the end.
    """
    for model in plan.models:
        check_sample_folder(plan, model)
    own = {name: samples_of_rank(images, rank, world_size) for name, images in plan.images.items()}
    num_missing = sum(len(missing(images)) for images in own.values())
    if rank == 0:
        console.print(plan.prompts.counts)
    total = sum(map(len, own.values()))
    if num_missing:
        with progress(console, shown=rank == 0) as bar:
            task = bar.add_task("sampling", total=total, completed=total - num_missing)
            sample_models(plan, own, lambda n: bar.advance(task, n))
    if rank == 0 and world_size > 1:
        # Last images first: the other ranks reach those last
        backwards = {name: images[::-1] for name, images in plan.images.items()}
        sample_models(plan, backwards, _ignore)


def check_sample_folder(plan: ComparisonPlan, model: Model) -> None:
    """Refuse a model's folder of images that were made with other settings."""
    ensure_same_settings(plan.samples / model.name, plan.sample_settings[model.name])


def _ignore(_: int) -> None:
    """Show no progress for images sampled in place of other ranks."""


def sample_models(
    plan: ComparisonPlan, images: Mapping[str, list[Sample]], advance: Callable[[int], None]
) -> None:
    """Sample what is missing of these images, model by model."""
    for model in plan.models:
        if missing(images[model.name]):
            sample_model(plan, model, images[model.name], advance)


def sample_model(
    plan: ComparisonPlan, model: Model, images: list[Sample], advance: Callable[[int], None]
) -> None:
    """Load one model and sample what is missing of its images."""
    from generate.sampler import ImageGenerator, sample_missing

    spec = plan.spec
    generator = ImageGenerator.load(
        model,
        choose_device("evaluate.device", spec.device, Rank.from_environment()),
        scheduler=spec.scheduler,
        dtype=spec.dtype,
        resolution=plan.resolution,
        steps=spec.steps,
        guidance=spec.guidance,
    )
    sample_missing(generator, images, spec.batch, advance)


def score_images(plan: ComparisonPlan, specs: Mapping[str, MetricSpec], console: Console) -> None:
    """Score all images with all judges, model by model; existing scores are kept."""
    if is_judged(plan.scores, plan.score_settings):
        return
    names = [model.name for model in plan.models]
    todo = [
        name
        for name in names
        if not is_judged(plan.model_scores(name), plan.model_score_settings(name))
    ]
    if todo:
        panel = load_panel(plan, specs)
        total = sum(len(plan.images[name]) for name in names)
        done = total - sum(len(plan.images[name]) for name in todo)
        with progress(console, shown=True) as bar:
            task = bar.add_task("scoring", total=total, completed=done)
            for name in todo:
                score_model(plan, name, panel, lambda n: bar.advance(task, n))
    tables = [read_table(plan.model_scores(name)) for name in names]
    write_table(plan.scores, pa.concat_tables(tables), plan.score_settings)


def load_panel(plan: ComparisonPlan, specs: Mapping[str, MetricSpec]) -> "Panel":
    """Load every judge, and record its weights and the libraries in `judges.json`."""
    from label.scoring.panel import Panel

    device = choose_device("evaluate.device", plan.spec.device, Rank.from_environment())
    panel = Panel.load({judge.metric: specs[judge.metric] for judge in plan.judges}, device)
    provenance = {"judges": panel.provenance(), "device": str(device), "packages": versions()}
    write_json(plan.judges_json, provenance)
    return panel


def score_model(
    plan: ComparisonPlan, name: str, panel: Scorers, advance: Callable[[int], None]
) -> None:
    """Score one model's images and write the scores to the model's own file."""
    images = plan.images[name]
    scores = judge(
        images,
        panel,
        batch=plan.spec.judge_batch,
        workers=num_workers(plan.spec.judge_workers),
        advance=advance,
    )
    write_scores(
        plan.model_scores(name),
        images,
        scores,
        folder=plan.folder,
        prompts_name=plan.prompts.name,
        settings=plan.model_score_settings(name),
    )


def progress(console: Console, *, shown: bool) -> Progress:
    """A progress bar with counts and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that sample and score."""
    return {"python": python_version()} | {name: version(name) for name in PACKAGES}
