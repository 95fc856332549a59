"""LAION's aesthetic predictor v2: a linear head on a CLIP's image embedding; knows no prompt."""

from typing import Any

from label.config import MetricSpec
from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import check_tensors, find_hf_clip, locate, vision_side


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """The image is prepared as for CLIP score, whose backbone the metric can share."""
    weights = find_hf_clip(name, spec, reads_prompt=False)
    transform = ImageTransform(ResizeMode.CROP_EVEN, vision_side(weights))
    files = {"head": check_tensors(name, locate(f"metrics.{name}.head", spec.head, None))}
    return ResolvedMetric(name, spec, transform, weights, files, repairs_prompts=True)


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """The head first, which is cheap, so that a wrong one fails early."""
    from label.metrics.aesthetic_head import Aesthetic, check_head, load_head

    head = load_head(resolved.files["head"])
    backbone = loader.backbone(resolved)
    check_head(resolved, head, backbone.dim)
    return Aesthetic(resolved, backbone, head)


METRIC = MetricDefinition(resolve, load)
