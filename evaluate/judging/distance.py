"""Measures how far each model has gone from the base, once; the numbers are kept in files.

`distance/images-<model>.json` has saturation and contrast of each image and the diversity of each
prompt; `distance/denoiser-<model>.json` how differently the denoiser predicts from the base's.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.artifacts.atomic import ShardError, read_json, write_json
from data.artifacts.config_diff import differences
from evaluate.judging.looks import contrast, pairwise_distance, saturation
from evaluate.judging.scores import read_pixels
from evaluate.plan import ComparisonPlan
from generate.image_files import Model, Sample
from label.config import MetricSpec

if TYPE_CHECKING:
    import torch

    from evaluate.judging.denoisers import Inputs, Predictions, Probe
    from generate.sampler import ImageGenerator
    from label.metrics.protocols import EmbeddingMetric

WHOLE = (
    {"saturation", "contrast"},
    {"predicts", "levels", "squared_difference", "base_error"},
    {"reason"},
)
"""What a file has: of images, of denoisers, or why these have no distance."""

Load = Callable[[Model], "ImageGenerator"]
Advance = Callable[[int], None]


def known(path: Path, wanted: Any) -> dict[str, Any] | None:
    """What was measured with these settings; None if nothing was, or the file is damaged."""
    if not path.exists():
        return None
    try:
        record = read_json(path, "it is measured again")
        facts: dict[str, Any] = record["facts"]
        is_whole = any(needed <= facts.keys() for needed in WHOLE)
        return facts if is_whole and not differences(record["settings"], wanted) else None
    except (ShardError, KeyError, TypeError, AttributeError):
        return None


def unmeasured(plan: ComparisonPlan) -> tuple[list[str], list[str]]:
    """Models without facts of their images, and those without any of their denoisers."""
    images = [
        model.name
        for model in plan.models
        if known(plan.image_facts(model.name), plan.image_fact_settings(model.name)) is None
    ]
    denoisers = [
        name
        for name in plan.candidates
        if plan.spec.distance_images
        and known(plan.denoiser_facts(name), plan.denoiser_fact_settings(name)) is None
    ]
    return images, denoisers


# --- images --------------------------------------------------------------------------------------


def measure_images(
    plan: ComparisonPlan, name: str, metric: "EmbeddingMetric | None", advance: Advance
) -> None:
    """Measure a model's images; `metric` embeds them where a prompt has several."""
    looks: dict[str, list[float]] = {"saturation": [], "contrast": []}
    for sample in plan.images[name]:
        pixels = read_pixels(sample.path)
        looks["saturation"].append(saturation(pixels))
        looks["contrast"].append(contrast(pixels))
        advance(1)
    facts: dict[str, Any] = dict(looks)
    if metric is not None:
        facts["diversity"] = diversity(plan.images[name], metric, plan.spec.judge_batch)
        facts["embedded_by"] = metric.resolved.name
    settings = plan.image_fact_settings(name)
    write_json(plan.image_facts(name), {"settings": settings, "facts": facts})


def embedding_metric(
    plan: ComparisonPlan, specs: Mapping[str, MetricSpec], device: "torch.device"
) -> "EmbeddingMetric | None":
    """The first judge that embeds images; None if none does."""
    from label.metrics.protocols import CrossMetric, EmbeddingMetric
    from label.scoring.panel import Panel

    for name in plan.metrics:
        metric = Panel.load({name: specs[name]}, device).metrics[name]
        if isinstance(metric, EmbeddingMetric) and not isinstance(metric, CrossMetric):
            return metric
    return None


def diversity(images: Sequence[Sample], metric: "EmbeddingMetric", batch: int) -> list[float]:
    """Each prompt's `pairwise_distance`, in the order of the prompts."""
    from label.metrics.preprocessing import process_image

    embedded = []
    transform = metric.resolved.transform
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        prepared = [process_image(one.path.read_bytes(), [transform]) for one in part]
        pixels = np.stack([one.arrays[transform] for one in prepared])
        embedded.append(metric.backbone.embed_images(pixels).float().cpu().numpy())
    rows = np.concatenate(embedded)
    prompts = np.array([image.prompt.id for image in images])
    return [pairwise_distance(rows[prompts == prompt]) for prompt in dict.fromkeys(prompts)]


# --- denoisers -----------------------------------------------------------------------------------


def measure_denoisers(
    plan: ComparisonPlan, names: Sequence[str], load: Load, advance: Advance
) -> None:
    """Compare the denoisers of these models with the base's."""
    from evaluate.judging.denoisers import Inputs, NotComparableError, Probe

    def probe(name: str) -> "Probe":
        model = next(model for model in plan.models if model.name == name)
        return Probe(load(model), model, plan.spec.scheduler)

    try:
        base = probe(plan.spec.base)
    except NotComparableError as error:
        for name in names:
            write_denoiser_facts(plan, name, {"reason": str(error)})
        return
    samples = first_of_prompts(plan)
    inputs = Inputs(samples, base.encode(samples))
    of_base = base.predictions(inputs, plan.spec.batch)
    advance(len(samples))
    base.close()
    for name in names:
        try:
            with closing(probe(name)) as model:
                facts = compared(model, base, inputs, of_base, plan.spec.batch)
        except NotComparableError as error:
            facts = {"reason": str(error)}
        write_denoiser_facts(plan, name, facts)
        advance(len(samples))


def first_of_prompts(plan: ComparisonPlan) -> list[Sample]:
    """The base's first image of each of the first prompts."""
    images = plan.images[plan.spec.base]
    return [image for image in images if image.seed == plan.seed][: plan.spec.distance_images]


def compared(
    model: "Probe", base: "Probe", inputs: "Inputs", of_base: "Predictions", batch: int
) -> dict[str, Any]:
    """How differently a model predicts from the base, by level and image.

    Raises:
        NotComparableError: It takes other latents, predicts something else, or is not finite.
    """
    from evaluate.judging.denoisers import LEVELS, NotComparableError, predicts, squared_differences

    model.check_comparable(base, inputs)
    squared = squared_differences(model.predictions(inputs, batch), of_base)
    if not np.isfinite(squared).all():
        raise NotComparableError(f"{model.model.name} predicts values that are not finite")
    return {
        "predicts": predicts(base.process),
        "levels": list(LEVELS),
        "squared_difference": squared.tolist(),
        "base_error": of_base.errors.double().tolist(),
    }


def write_denoiser_facts(plan: ComparisonPlan, name: str, facts: dict[str, Any]) -> None:
    """Write what is known of a model's denoiser."""
    settings = plan.denoiser_fact_settings(name)
    write_json(plan.denoiser_facts(name), {"settings": settings, "facts": facts})
