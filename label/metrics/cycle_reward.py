"""CycleReward (Bahng et al. 2025): ImageReward's network and 128 tokens of the prompt.

It was trained on cycle consistency.
"""

from typing import Any

from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.blip import Recipe, resolve

RECIPE = Recipe(num_tokens=128, gelu=True, layers=(0, 2, 4, 6, 8))


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """A network of its own."""
    from label.metrics.blip_reward import Blip

    return Blip(resolved, RECIPE, loader.device)


METRIC = MetricDefinition(resolve, load)
