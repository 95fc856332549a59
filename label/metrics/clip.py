"""CLIP score (Hessel et al. 2021): the cosine of a Hugging Face CLIP's two embeddings.

It is meant without its prefix, clamp and factor.
"""

from typing import Any

from label.config import MetricSpec
from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import find_hf_clip, vision_side


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """Prompts are repaired as OpenAI's own tokenizer does it."""
    weights = find_hf_clip(name, spec)
    transform = ImageTransform(ResizeMode.CROP_EVEN, vision_side(weights))
    choices = {"prompts": "repaired by ftfy, HTML entities resolved"}
    return ResolvedMetric(
        name, spec, transform, weights, choices=choices, repairs_prompts=True
    )  # fmt: skip


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """The cosine on a backbone that may be shared."""
    from label.metrics.cosine import CosineMetric

    return CosineMetric(resolved, loader.backbone(resolved))


METRIC = MetricDefinition(resolve, load)
