"""HPSv2 and v2.1 (Wu et al. 2023): the cosine of an open_clip model's two embeddings.

Published tables show it times 100.
"""

import gzip
import zlib
from pathlib import Path
from typing import Any

from data.artifacts.readable import UnreadableError, check_readable
from label.config import MetricSpec
from label.metrics.base import BackboneFamily, MetricDefinition, ResolvedMetric
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import (
    OPEN_CLIP_ON_HUB,
    OPEN_CLIP_WEIGHTS,
    Weights,
    WeightsError,
    find_tensors,
    locate,
    read_config,
    side_of,
)


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """The image is padded to a square; `arch` counts where the weights are a bare file."""
    where = locate(f"metrics.{name}.weights", spec.weights, spec.revision, OPEN_CLIP_ON_HUB)
    weights = open_clip_weights(name, where, spec.arch)
    side = side_of(weights.config["model_cfg"]["vision_cfg"].get("image_size", 224), where)
    return ResolvedMetric(
        name,
        spec,
        ImageTransform(ResizeMode.PAD, side, spec.antialias),
        weights,
        choices={"arch": spec.arch} if weights.tensors == weights.where else {},
        family=BackboneFamily.open_clip,
    )


def load(resolved: ResolvedMetric, loader: Any) -> Any:
    """The cosine on a backbone that may be shared."""
    from label.metrics.cosine import CosineMetric

    return CosineMetric(resolved, loader.backbone(resolved))


METRIC = MetricDefinition(resolve, load)


def open_clip_weights(name: str, where: Path, arch: str) -> Weights:
    """An open_clip model: a folder with open_clip_config.json, or a bare file of `arch`.

    Raises:
        WeightsError: Something is missing, or open_clip does not know `arch`.
    """
    tensors = find_tensors(name, where, OPEN_CLIP_WEIGHTS)
    if not where.is_dir():
        return Weights(where, tensors, architecture(name, arch), (tensors,))
    config = read_config(name, where / "open_clip_config.json")
    described = config.get("model_cfg")
    if not isinstance(described, dict) or not all(
        isinstance(described.get(part), dict) for part in ("vision_cfg", "text_cfg")
    ):
        raise WeightsError(
            f"metrics.{name}: {where}/open_clip_config.json has no model_cfg with vision_cfg and "
            "text_cfg"
        )
    config["preprocess"] = config.get("preprocess_cfg", {})
    merges = tuple(sorted(where.glob("*.gz")))
    for path in merges:
        check_words(name, path)
    return Weights(where, tensors, config, (tensors, where / "open_clip_config.json", *merges))


def check_words(name: str, path: Path) -> None:
    """Refuse merges of an open_clip tokenizer that cannot be read.

    Raises:
        WeightsError: The file is torn, empty, a folder or a Git LFS pointer.
    """
    try:
        check_readable(path, f"metrics.{name}")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except UnreadableError as error:
        raise WeightsError(str(error)) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise WeightsError(
            f"metrics.{name}: {path} cannot be read as gzipped text ({error}); fetch it again"
        ) from error
    if len(lines) < 2 or not all(len(line.split()) == 2 for line in lines[1:] if line):
        raise WeightsError(
            f"metrics.{name}: {path} holds no merges; after its first line, each line has the two "
            "pieces that make a token: fetch it again"
        )


def architecture(name: str, arch: str) -> dict[str, Any]:
    """open_clip's description of a named architecture, read without importing torch."""
    from importlib.util import find_spec

    package = find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model_configs"
    path = folder / f"{arch}.json"
    if not path.is_file():
        allowed = ", ".join(sorted(file.stem for file in folder.glob("ViT-[BLHg]-*.json")))
        raise WeightsError(f"metrics.{name}.arch={arch} is unknown to open_clip; it has {allowed}")
    return {"model_cfg": read_config(name, path)}
