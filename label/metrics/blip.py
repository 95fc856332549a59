"""What ImageReward and CycleReward have in common, but for the network (`blip_reward`).

Both were published in BLIP's own classes and read prompts with BERT's tokenizer, which lies in a
folder of its own.
"""

from dataclasses import dataclass
from pathlib import Path

from label.config import MetricSpec
from label.metrics.architectures import BLIP_LARGE
from label.metrics.base import ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import (
    HF_WEIGHTS,
    Weights,
    WeightsError,
    find_tensors,
    find_tokenizer,
    index_parts,
    locate,
    read_config,
    vision_side,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the rewards on BLIP differ in."""

    num_tokens: int
    """Tokens of the prompt that are read, the two at its ends included; the rest is cut off."""
    gelu: bool
    """Whether the head has a GELU between its layers; without one it is linear."""
    layers: tuple[int, ...]
    """The checkpoint's numbers of the head's linear layers; the others have no weights."""
    mean: float = 0.0
    std: float = 1.0
    """Score = (head's output - mean) / std."""


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """The image is cropped as OpenAI's code does it."""
    where = locate(f"metrics.{name}.weights", spec.weights, spec.revision)
    weights = blip_weights(name, where, find_tokenizer(name, spec, "vocab.txt"))
    return ResolvedMetric(
        name, spec, ImageTransform(ResizeMode.CROP_EVEN, vision_side(weights)), weights
    )


def blip_weights(name: str, where: Path, words: tuple[Path, ...]) -> Weights:
    """A reward on BLIP: a bare file of the published size, or a folder with a config.json.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    tensors = find_tensors(name, where, HF_WEIGHTS)
    if not where.is_dir():
        return Weights(where, tensors, BLIP_LARGE, (tensors, *words), words)
    config = read_config(name, where / "config.json")
    if not all(isinstance(config.get(part), dict) for part in BLIP_LARGE):
        raise WeightsError(
            f"metrics.{name}: {where}/config.json describes no BLIP; it needs "
            f"{' and '.join(BLIP_LARGE)}"
        )
    files = (tensors, *index_parts(tensors), where / "config.json", *words)
    return Weights(where, tensors, config, files, words)
