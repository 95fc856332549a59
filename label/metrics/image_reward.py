"""ImageReward (Xu et al. 2023): BLIP reads the image and 35 tokens of the prompt together."""

from typing import Any

from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.blip import Recipe, resolve

RECIPE = Recipe(
    num_tokens=35,
    gelu=False,
    layers=(0, 2, 4, 6, 7),
    # ImageReward's own constants: the statistics of its output on its training set.
    mean=0.16717362830052426,
    std=1.0333394966054072,
)


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """A network of its own."""
    from label.metrics.blip_reward import Blip

    return Blip(resolved, RECIPE, loader.device)


METRIC = MetricDefinition(resolve, load)
