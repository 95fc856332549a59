"""PickScore (Kirstain et al. 2023): the cosine of a CLIP's two embeddings, times exp(logit_scale).

The published weights give about 17 to 26, and the softmax over two images is the chance of each to
be preferred.
"""

from typing import Any

from label.config import MetricSpec
from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import find_hf_clip, vision_side


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """Images are cropped as Hugging Face's processor does it; prompts are read as typed."""
    weights = find_hf_clip(name, spec)
    return ResolvedMetric(
        name, spec, ImageTransform(ResizeMode.CROP, vision_side(weights)), weights
    )


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """The scaled cosine on a backbone that may be shared."""
    from label.metrics.cosine import CosineMetric

    return CosineMetric(resolved, loader.backbone(resolved), scaled=True)


METRIC = MetricDefinition(resolve, load)
