"""MPS (Zhang et al. 2024): a CLIP ViT-H/14 whose image looks at part of the prompt.

The part is what the prompt has to do with a condition, words that say what is judged.
"""

from pathlib import Path
from typing import Any

from label.config import MetricSpec
from label.metrics.architectures import MPS_H
from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import (
    HF_WEIGHTS,
    VOCABULARY,
    Weights,
    WeightsError,
    check_tokenizer,
    find_tensors,
    find_tokenizer,
    index_parts,
    locate,
    read_config,
    tokenizer_files,
    vision_side,
)


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """`condition` and `threshold` decide what of the prompt is seen."""
    check_choices(name, spec)
    where = locate(f"metrics.{name}.weights", spec.weights, spec.revision)
    words = find_tokenizer(name, spec, VOCABULARY) if spec.tokenizer else None
    weights = mps_weights(name, where, words)
    check_tokenizer(name, where, weights.words, VOCABULARY)
    return ResolvedMetric(
        name,
        spec,
        ImageTransform(ResizeMode.CROP, vision_side(weights)),
        weights,
        choices={"condition": spec.condition, "threshold": spec.threshold},
    )


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """A network of its own."""
    from label.metrics.mps_network import Mps

    return Mps(resolved, loader.device)


METRIC = MetricDefinition(resolve, load)


def check_choices(name: str, spec: MetricSpec) -> None:
    """Refuse a condition or a threshold that means nothing.

    Raises:
        WeightsError: Says what is allowed.
    """
    if not 0 <= spec.threshold < 1:
        raise WeightsError(f"metrics.{name}.threshold={spec.threshold}; it must be in [0, 1)")
    if not spec.condition.strip():
        raise WeightsError(
            f"metrics.{name}.condition is empty; a metric of kind mps needs the words that say "
            "what is judged, and conf/metric/mps.yaml has the published ones"
        )


def mps_weights(name: str, where: Path, words: tuple[Path, ...] | None) -> Weights:
    """MPS: of the published size, or a folder whose config.json says another.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    tensors = find_tensors(name, where, HF_WEIGHTS)
    folder = where if where.is_dir() else where.parent
    words = tokenizer_files(folder) if words is None else words
    described = where.is_dir() and (where / "config.json").is_file()
    config = read_config(name, where / "config.json") if described else {}
    if "vision_config" not in config:  # the published folder's config.json says nothing
        return Weights(where, tensors, MPS_H, (tensors, *index_parts(tensors), *words), words)
    if missing := MPS_H.keys() - config.keys():
        raise WeightsError(
            f"metrics.{name}: {where}/config.json describes no MPS; it lacks "
            f"{', '.join(sorted(missing))}"
        )
    files = (tensors, *index_parts(tensors), where / "config.json", *words)
    return Weights(where, tensors, config, files, words)
