"""The judge's two heavy steps: draw the images that are missing, score them all.

Light at the top: torch is imported only when there is something to do.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from platform import python_version
from typing import TYPE_CHECKING

import pyarrow as pa
from rich.console import Console

from data.artifacts.atomic import write_json
from data.artifacts.parquet_io import read_table, write_table
from data.distributed import Rank
from evaluate.judging import Scorers, is_judged, judge, write_scores
from evaluate.plan import ComparisonPlan
from evaluate.reporting.console import progress
from generate.image_files import Model, Sample, agree, missing, share
from label.config import MetricSpec

if TYPE_CHECKING:
    from label.scoring.panel import Panel

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "polars", "scipy")


def sample_images(contest: ComparisonPlan, console: Console, rank: int, world: int) -> None:
    """Draw this process's part of the images that are not there yet.

    The first process ends with what the others have not drawn by then, whether they are slower or
    dead, so that nothing is missing afterwards.
    """
    for model in contest.models:
        agree_on(contest, model)
    own = {name: share(images, rank, world) for name, images in contest.images.items()}
    left = sum(len(missing(images)) for images in own.values())
    if rank == 0:
        console.print(contest.prompts.counts)
    total = sum(map(len, own.values()))
    if left:
        with progress(console, shown=rank == 0) as bar:
            task = bar.add_task("drawing", total=total, completed=total - left)
            draw_models(contest, own, lambda n: bar.advance(task, n))
    if rank == 0 and world > 1:
        # From the far end, where nobody is for the longest time
        backwards = {name: images[::-1] for name, images in contest.images.items()}
        draw_models(contest, backwards, _nobody)


def agree_on(contest: ComparisonPlan, model: Model) -> None:
    """Make sure that a model's folder of images is of this comparison."""
    agree(contest.samples / model.name, contest.sample_settings[model.name])


def _nobody(_: int) -> None:
    """Nobody counts what is drawn for others."""


def draw_models(
    contest: ComparisonPlan, images: Mapping[str, list[Sample]], drawn: Callable[[int], None]
) -> None:
    """Draw what is missing of these images, model by model."""
    for model in contest.models:
        if missing(images[model.name]):
            draw_model(contest, model, images[model.name], drawn)


def draw_model(
    contest: ComparisonPlan, model: Model, images: list[Sample], drawn: Callable[[int], None]
) -> None:
    """Load one model and draw what is missing of its images."""
    from generate.sampler import ImageGenerator, device_of, draw_missing

    spec = contest.spec
    generator = ImageGenerator.load(
        model,
        device_of(spec.device, Rank.from_environment().local_rank),
        scheduler=spec.scheduler,
        dtype=spec.dtype,
        resolution=contest.resolution,
        steps=spec.steps,
        guidance=spec.guidance,
    )
    draw_missing(generator, images, spec.batch, drawn)


def score_images(
    contest: ComparisonPlan, specs: Mapping[str, MetricSpec], console: Console
) -> None:
    """Score all images with all judges, model by model; what has been scored stays."""
    if is_judged(contest.scores, contest.score_settings):
        return
    names = [model.name for model in contest.models]
    todo = [
        name
        for name in names
        if not is_judged(contest.model_scores(name), contest.model_score_settings(name))
    ]
    if todo:
        panel = load_panel(contest, specs)
        total = sum(len(contest.images[name]) for name in names)
        done = total - sum(len(contest.images[name]) for name in todo)
        with progress(console, shown=True) as bar:
            task = bar.add_task("scoring", total=total, completed=done)
            for name in todo:
                score_model(contest, name, panel, lambda n: bar.advance(task, n))
    parts = [read_table(contest.model_scores(name)) for name in names]
    write_table(contest.scores, pa.concat_tables(parts), contest.score_settings)


def load_panel(contest: ComparisonPlan, specs: Mapping[str, MetricSpec]) -> "Panel":
    """Load every judge, and note which weights they are."""
    from generate.sampler import device_of
    from label.scoring.panel import Panel

    device = device_of(contest.spec.device, Rank.from_environment().local_rank)
    panel = Panel.load({judge.metric: specs[judge.metric] for judge in contest.judges}, device)
    made = {"judges": panel.provenance(), "device": str(device), "packages": versions()}
    write_json(contest.judges_json, made)
    return panel


def score_model(
    contest: ComparisonPlan, name: str, panel: Scorers, scored: Callable[[int], None]
) -> None:
    """Score one model's images and keep its scores in a file of its own."""
    images = contest.images[name]
    scores = judge(
        images,
        panel,
        batch=contest.spec.judge_batch,
        workers=contest.spec.judge_workers,
        scored=scored,
    )
    write_scores(
        contest.model_scores(name),
        images,
        scores,
        folder=contest.folder,
        prompts_name=contest.prompts.name,
        settings=contest.model_score_settings(name),
    )


def versions() -> dict[str, str]:
    """The libraries that drew and scored."""
    return {"python": python_version()} | {name: version(name) for name in PACKAGES}
