"""The miniature world's judge: it looks at pixels, needs no weights, and never votes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from label.config import MetricSpec
from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode


@dataclass(frozen=True, slots=True)
class Oracle:
    """How much of its prompt an image shows, in [0, 1]."""

    resolved: ResolvedMetric

    def judge(
        self, images: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> Float[np.ndarray, " row"]:
        """The mean clarity of the prompt's attributes.

        Raises:
            ValueError: A prompt is no sentence of the miniature world.
        """
        from data.miniature.oracle import oracle  # the renderer is only for the miniature

        scores = [
            oracle(pixels, prompt) if prompt.strip() else math.nan
            for pixels, prompt in zip(images, prompts, strict=True)
        ]
        return np.array(scores, np.float32)


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """Every pixel, at the image's own size."""
    return ResolvedMetric(name, spec, ImageTransform(ResizeMode.NONE))


def load(resolved: ResolvedMetric, _: Any) -> Oracle:
    """There are no weights."""
    return Oracle(resolved)


def unreadable(prompt: str) -> str:
    """Whether a prompt is no sentence of the miniature world, and how to tell."""
    from data.miniature import scenes

    try:
        scenes.parse(prompt)
    except ValueError as error:
        return str(error)
    return ""


METRIC = MetricDefinition(resolve, load, can_vote=False, unreadable=unreadable)
