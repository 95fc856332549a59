"""Where a scorer's files lie: local folders and bare files, or the hub at a commit.

Nothing here imports torch or loads a weight; what is missing is named with its setting.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.storage.hub import HubError, Wanted, resolve
from label.metrics.architectures import BLIP_LARGE, MPS_H, QWEN2_VL_7B

HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
"""Bare weight files that are read; everything but safetensors with `weights_only=True`."""

TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
WORDS_ON_HUB = (("*.json", "*.txt"),)
HF_ON_HUB = (
    ("*.json", "*.txt", "model*.safetensors"),
    ("*.json", "*.txt", "pytorch_model.bin"),
)
OPEN_CLIP_ON_HUB = (("open_clip_config.json", "*.gz", "open_clip*.safetensors"),)
"""What is fetched of a repository, tried in this order; the last of each must be there. Of
`owner/name/file` it is the file alone."""


class WeightsError(ValueError):
    """Weights are missing, incomplete or not what they should be; the message names them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint on this disk."""

    where: Path
    """Folder, or bare file, after a hub id was resolved."""
    tensors: Path
    """The file with the tensors, or the index of several."""
    config: dict[str, Any]
    """The architecture's description that lies beside it, or is known by its name."""
    files: tuple[Path, ...]
    """Everything beside the tokenizer that decides an embedding: tensors, configuration."""
    words: tuple[Path, ...] = ()
    """The tokenizer's files; the family's own where there are none."""


def locate(
    setting: str, value: str, revision: str | None, patterns: Sequence[Sequence[str]] = HF_ON_HUB
) -> Path:
    """A local path, or a hub id at a commit (of a repository: some files), as a local path.

    Raises:
        WeightsError: Nothing is there, or the hub id has no commit; names the setting.
    """
    commit = "tokenizer_revision" if setting.endswith(".tokenizer") else "revision"
    try:
        return resolve(setting, value, revision, Wanted(patterns=patterns, revision=commit))
    except HubError as error:
        raise WeightsError(str(error)) from error


def hf_weights(name: str, where: Path, words: tuple[Path, ...] | None) -> Weights:
    """A Hugging Face CLIPModel: a folder, or a weights file beside its config.json.

    `words` are the files of a tokenizer that lies elsewhere; None takes what is beside the weights.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    folder = where if where.is_dir() else where.parent
    tensors = _tensors(name, where, HF_WEIGHTS)
    config = _json(name, folder / "config.json")
    if not isinstance(config.get("vision_config"), dict):
        raise WeightsError(f"metrics.{name}: {folder}/config.json describes no CLIPModel")
    preprocess = folder / "preprocessor_config.json"
    if preprocess.is_file():
        config["preprocess"] = _json(name, preprocess)
    words = tokenizer_files(folder) if words is None else words
    files = (tensors, *_parts(tensors), folder / "config.json", *words)
    return Weights(where, tensors, config, files, words)


def blip_weights(name: str, where: Path, words: tuple[Path, ...]) -> Weights:
    """A reward on BLIP: a bare file of the published size, or a folder with a config.json.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    tensors = _tensors(name, where, HF_WEIGHTS)
    if not where.is_dir():
        return Weights(where, tensors, BLIP_LARGE, (tensors, *words), words)
    config = _json(name, where / "config.json")
    if not all(isinstance(config.get(part), dict) for part in BLIP_LARGE):
        raise WeightsError(
            f"metrics.{name}: {where}/config.json describes no BLIP; it needs "
            f"{' and '.join(BLIP_LARGE)}"
        )
    files = (tensors, *_parts(tensors), where / "config.json", *words)
    return Weights(where, tensors, config, files, words)


def mps_weights(name: str, where: Path, words: tuple[Path, ...] | None) -> Weights:
    """MPS: of the published size, or a folder whose config.json says another.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    tensors = _tensors(name, where, HF_WEIGHTS)
    folder = where if where.is_dir() else where.parent
    words = tokenizer_files(folder) if words is None else words
    described = where.is_dir() and (where / "config.json").is_file()
    config = _json(name, where / "config.json") if described else {}
    if "vision_config" not in config:  # the published folder's config.json says nothing
        return Weights(where, tensors, MPS_H, (tensors, *_parts(tensors), *words), words)
    if missing := MPS_H.keys() - config.keys():
        raise WeightsError(
            f"metrics.{name}: {where}/config.json describes no MPS; it lacks "
            f"{', '.join(sorted(missing))}"
        )
    files = (tensors, *_parts(tensors), where / "config.json", *words)
    return Weights(where, tensors, config, files, words)


def qwen_weights(name: str, where: Path, words: tuple[Path, ...]) -> Weights:
    """HPSv3: a bare file of the published size, or a folder with a config.json.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    tensors = _tensors(name, where, HF_WEIGHTS)
    files = (tensors, *_parts(tensors), *words)
    if not where.is_dir():
        return Weights(where, tensors, QWEN2_VL_7B, files, words)
    config = _json(name, where / "config.json")
    if not all(isinstance(config.get(part), dict) for part in QWEN2_VL_7B):
        raise WeightsError(
            f"metrics.{name}: {where}/config.json describes no Qwen2-VL; it needs "
            f"{' and '.join(QWEN2_VL_7B)}"
        )
    return Weights(where, tensors, config, (*files, where / "config.json"), words)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of a Hugging Face tokenizer in a folder, those that are there."""
    return tuple(folder / file for file in TOKENIZERS if (folder / file).is_file())


def check_tokenizer(name: str, where: Path, words: Sequence[Path], vocabulary: str) -> None:
    """Refuse a folder whose tokenizer has no words.

    Raises:
        WeightsError: Neither tokenizer.json nor the `vocabulary` file is there.
    """
    if not {"tokenizer.json", vocabulary} & {path.name for path in words}:
        also = " and merges.txt" if vocabulary == "vocab.json" else ""
        raise WeightsError(
            f"metrics.{name}: {where} has no tokenizer; it needs tokenizer.json, or {vocabulary}"
            f"{also}"
        )


def open_clip_weights(name: str, where: Path, arch: str) -> Weights:
    """An open_clip model: a folder with open_clip_config.json, or a bare file of `arch`.

    Raises:
        WeightsError: Something is missing, or open_clip does not know `arch`.
    """
    tensors = _tensors(name, where, OPEN_CLIP_WEIGHTS)
    if not where.is_dir():
        return Weights(where, tensors, _arch(name, arch), (tensors,))
    config = _json(name, where / "open_clip_config.json")
    if "model_cfg" not in config:
        raise WeightsError(f"metrics.{name}: {where}/open_clip_config.json has no model_cfg")
    config["preprocess"] = config.get("preprocess_cfg", {})
    merges = tuple(sorted(where.glob("*.gz")))
    return Weights(where, tensors, config, (tensors, where / "open_clip_config.json", *merges))


def _tensors(name: str, where: Path, candidates: Sequence[str]) -> Path:
    if where.is_file():
        if where.suffix not in WEIGHT_FILES:
            raise WeightsError(
                f"metrics.{name}.weights={where}; a weights file ends in {', '.join(WEIGHT_FILES)}"
            )
        return where
    for candidate in candidates:
        if (where / candidate).is_file():
            return where / candidate
    raise WeightsError(f"metrics.{name}: {where} has none of {', '.join(candidates)}")


def _parts(tensors: Path) -> tuple[Path, ...]:
    """The files that an index of several refers to."""
    if not tensors.name.endswith(".index.json"):
        return ()
    index = json.loads(tensors.read_text())["weight_map"]
    return tuple(tensors.parent / file for file in sorted(set(index.values())))


def _json(name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"metrics.{name}: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"metrics.{name}: {path} is no JSON object")
    return value


def _arch(name: str, arch: str) -> dict[str, Any]:
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
    return {"model_cfg": _json(name, path)}


def side_of(size: int | Sequence[int]) -> int:
    """Pixels of a side, however a configuration says it."""
    return size if isinstance(size, int) else size[0]
