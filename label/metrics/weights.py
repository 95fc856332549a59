"""Where a scorer's files lie: local folders and bare files, or the hub at a commit.

Nothing here imports torch or loads a weight; what is missing is named with its setting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.readable import UnreadableError, check_readable, read_json_object
from data.models.safetensors_header import index_files, read_header
from data.models.tokenizer import BERT_FILES, CLIP_FILES, check_vocabulary
from data.storage.hub import HubError, Wanted, resolve
from label.config import MetricSpec

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
VOCABULARY = "vocab.json"
"""What CLIP's and Qwen's tokenizers have where they have no tokenizer.json."""

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


def find_hf_clip(name: str, spec: MetricSpec, *, reads_prompt: bool = True) -> Weights:
    """The files of a metric on a Hugging Face CLIP, and of its tokenizer where prompts are read.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    where = locate(f"metrics.{name}.weights", spec.weights, spec.revision)
    words = find_tokenizer(name, spec, VOCABULARY) if spec.tokenizer else None
    weights = hf_weights(name, where, words)
    if reads_prompt:
        check_tokenizer(name, where, weights.words, VOCABULARY)
    return weights


def find_tokenizer(name: str, spec: MetricSpec, vocabulary: str) -> tuple[Path, ...]:
    """The files of a tokenizer that does not lie beside the weights.

    Raises:
        WeightsError: There is none at `tokenizer`.
    """
    setting = f"metrics.{name}.tokenizer"
    where = locate(setting, spec.tokenizer, spec.tokenizer_revision, WORDS_ON_HUB)
    words = tokenizer_files(where)
    check_tokenizer(name, where, words, vocabulary)
    return words


def hf_weights(name: str, where: Path, words: tuple[Path, ...] | None) -> Weights:
    """A Hugging Face CLIPModel: a folder, or a weights file beside its config.json.

    `words` are the files of a tokenizer that lies elsewhere; None takes what is beside the weights.

    Raises:
        WeightsError: Something is missing or of another kind.
    """
    folder = where if where.is_dir() else where.parent
    tensors = find_tensors(name, where, HF_WEIGHTS)
    config = read_config(name, folder / "config.json")
    if not isinstance(config.get("vision_config"), dict):
        raise WeightsError(f"metrics.{name}: {folder}/config.json describes no CLIPModel")
    preprocess = folder / "preprocessor_config.json"
    if preprocess.is_file():
        config["preprocess"] = read_config(name, preprocess)
    words = tokenizer_files(folder) if words is None else words
    files = (tensors, *index_parts(tensors), folder / "config.json", *words)
    return Weights(where, tensors, config, files, words)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of a Hugging Face tokenizer in a folder, those that are there."""
    return tuple(folder / file for file in TOKENIZERS if (folder / file).is_file())


def check_tokenizer(name: str, where: Path, words: Sequence[Path], vocabulary: str) -> None:
    """Refuse a folder whose tokenizer has no words, or not all of them.

    Raises:
        WeightsError: Neither tokenizer.json nor the `vocabulary` file is there, or it is damaged.
    """
    folder = words[0].parent if words else where if where.is_dir() else where.parent
    plain = CLIP_FILES if vocabulary == VOCABULARY else BERT_FILES
    try:
        check_vocabulary(folder, f"metrics.{name}", plain)
    except UnreadableError as error:
        raise WeightsError(str(error)) from error


def find_tensors(name: str, where: Path, candidates: Sequence[str]) -> Path:
    """The file with the tensors: `where` itself, or the first candidate in that folder.

    Raises:
        WeightsError: There is none, or it is no weights file.
    """
    if where.is_file():
        if where.suffix not in WEIGHT_FILES:
            raise WeightsError(
                f"metrics.{name}.weights={where}; a weights file ends in {', '.join(WEIGHT_FILES)}"
            )
        return check_tensors(name, where)
    for candidate in candidates:
        if (where / candidate).exists():
            return check_tensors(name, where / candidate)
    raise WeightsError(f"metrics.{name}: {where} has none of {', '.join(candidates)}")


def check_tensors(name: str, path: Path) -> Path:
    """The file, after a look at what can be told without loading it.

    Raises:
        WeightsError: It is torn, empty, a folder or a Git LFS pointer.
    """
    try:
        if path.suffix == ".safetensors" or path.name.endswith(".index.json"):
            read_header(path)
        else:
            check_readable(path)
    except UnreadableError as error:
        raise WeightsError(f"metrics.{name}: {error}") from error
    return path


def index_parts(tensors: Path) -> tuple[Path, ...]:
    """The files that an index of several refers to."""
    if not tensors.name.endswith(".index.json"):
        return ()
    return tuple(index_files(tensors))


def read_config(name: str, path: Path) -> dict[str, Any]:
    """A JSON object that describes an architecture.

    Raises:
        WeightsError: The file cannot be read as one.
    """
    try:
        return read_json_object(path, f"metrics.{name}")
    except UnreadableError as error:
        raise WeightsError(str(error)) from error


def side_of(size: Any, where: Path) -> int:
    """Pixels of a side, however a configuration says it.

    Raises:
        WeightsError: It says something else.
    """
    side = size[0] if isinstance(size, list | tuple) and size else size
    if not isinstance(side, int) or side < 1:
        raise WeightsError(
            f"{where} is described with image_size={size!r}; needed is a number of pixels"
        )
    return side


def vision_side(weights: Weights) -> int:
    """Pixels of a side of the images that a Hugging Face vision model reads."""
    return side_of(weights.config["vision_config"].get("image_size", 224), weights.where)
