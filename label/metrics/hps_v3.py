"""HPSv3 (Ma et al. 2025): Qwen2-VL-7B reads the image and an instruction with the prompt in it."""

from pathlib import Path
from typing import Any

from label.config import MetricSpec
from label.metrics.architectures import QWEN2_VL_7B
from label.metrics.base import MetricDefinition, ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import (
    HF_WEIGHTS,
    VOCABULARY,
    Weights,
    WeightsError,
    find_tensors,
    find_tokenizer,
    index_parts,
    locate,
    read_config,
)

SIDE = 448
"""HPSv3 reads images of about 448 x 448 pixels: 256 tokens of 28 x 28."""


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """`template` is the instruction, which is not part of this program."""
    where = locate(f"metrics.{name}.weights", spec.weights, spec.revision)
    weights = qwen_weights(name, where, find_tokenizer(name, spec, VOCABULARY))
    files = {"template": locate(f"metrics.{name}.template", spec.template, None)}
    return ResolvedMetric(name, spec, ImageTransform(ResizeMode.AREA, SIDE), weights, files)


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """A network of its own."""
    from label.metrics.hps_v3_network import HpsV3

    return HpsV3(resolved, loader.device)


METRIC = MetricDefinition(resolve, load)


def qwen_weights(name: str, where: Path, words: tuple[Path, ...]) -> Weights:
    """HPSv3: a bare file of the published size, or a folder with a config.json.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    tensors = find_tensors(name, where, HF_WEIGHTS)
    files = (tensors, *index_parts(tensors), *words)
    if not where.is_dir():
        return Weights(where, tensors, QWEN2_VL_7B, files, words)
    config = read_config(name, where / "config.json")
    if not all(isinstance(config.get(part), dict) for part in QWEN2_VL_7B):
        raise WeightsError(
            f"metrics.{name}: {where}/config.json describes no Qwen2-VL; it needs "
            f"{' and '.join(QWEN2_VL_7B)}"
        )
    return Weights(where, tensors, config, (*files, where / "config.json"), words)
