"""Whether a diffusers folder is whole, before anything of it is loaded.

Every part's weights are compared with its architecture by names and shapes: those of the file's
header with those of the configured class on the meta device. It takes a second and no memory.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from data.artifacts.readable import UnreadableError, read_json_object
from data.models.fit import misfit
from data.models.safetensors_header import TensorInfo, read_header, some
from data.models.tokenizer import (
    check_settings,
    check_size,
    check_vocabulary,
    load_tokenizer,
    vocabulary_files,
)

INDEX = "model_index.json"
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library of a part -> the name of its weights before `.safetensors`."""
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that neither training nor sampling from prompts uses."""
BUFFERS = ("position_ids",)
"""Ends of names in old files that are no weights."""
CHAT = ("Qwen3Model",)
"""Language models whose pipelines frame a prompt by the tokenizer's chat template."""
BY_HEADER = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Gemma2Model", *CHAT,
    "Qwen2_5_VLForConditionalGeneration",
)  # fmt: skip
"""Text encoders whose files have the names of the class; others are loaded to be checked."""
ENDING = ("CLIPTokenizer", "T5Tokenizer")
"""Tokenizers whose end of a prompt the text encoder waits for."""
PREFIX = re.compile(r"^(text_model\.|model\.language_model\.|model\.)")
"""Begins the names of a text encoder in some versions of transformers and not in others, and where
it was saved with a head."""
HEAD = "lm_head.weight"
"""A language model's head, which encoding does not need."""
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def check_model_folder(folder: Path, what: str) -> dict[str, Any]:
    """Refuse a diffusers folder of which a part is missing, damaged or another than described.

    Messages begin with `what`, the setting or the model's name. Returns its model_index.json.

    Raises:
        UnreadableError: Names the file, what is wrong with it, and what to do.
    """
    index = read_json_object(folder / INDEX, what)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or name in NOT_NEEDED:
            continue
        if entry != [None, None]:
            check_part(folder, name, what, entry)
    return index


def check_part(folder: Path, name: str, what: str, entry: Sequence[Any] | None = None) -> None:
    """Refuse a part of a folder; `entry` are its library and class, from the index if left out.

    Raises:
        UnreadableError: Names the file, what is wrong with it, and what to do.
    """
    entry = entry or read_json_object(folder / INDEX, what).get(name)
    if not isinstance(entry, list) or len(entry) != 2:
        raise UnreadableError(
            f"{what}: {folder / INDEX} has {name}={entry!r}; needed is a library and a class"
        )
    library, kind = entry[0], getattr(LIBRARIES.get(entry[0]), str(entry[1]), None)
    if not (folder / name).is_dir():
        raise UnreadableError(f"{what}: {folder} has no folder {name!r}, which its {INDEX} lists")
    if library not in LIBRARIES or not isinstance(kind, type):
        raise UnreadableError(
            f"{what}: {folder / INDEX} has {name}={entry}, a class that {library} does not have "
            "here; code that comes with a model is not run"
        )
    part = folder / name
    if "Tokenizer" in kind.__name__:
        _check_tokenizer(part, kind, what)
    elif "Scheduler" in kind.__name__:
        _check_scheduler(part, kind, what)
    elif library == "diffusers" or kind.__name__ in BY_HEADER:
        _check_weights(part, library, kind, what)
    elif issubclass(kind, torch.nn.Module):
        _check_by_loading(part, kind, what)


def weight_file(part: Path, library: str, what: str) -> Path:
    """The file of a part's weights that its library reads, or the index of several.

    Raises:
        UnreadableError: There is none; pickles and variants such as fp16 are not read.
    """
    single = part / f"{WEIGHTS[library]}.safetensors"
    several = single.with_name(f"{single.name}.index.json")
    for path in (several, single) if library == "diffusers" else (single, several):
        if path.exists():
            return path
    raise UnreadableError(
        f"{what}: {part} has neither {single.name} nor {several.name}; pickled weights and "
        "variants such as fp16 are not read: load the model with diffusers once (variant='fp16') "
        "and save it with save_pretrained(FOLDER)"
    )


def _check_tokenizer(part: Path, kind: Any, what: str) -> None:
    check_settings(part, what)
    check_vocabulary(part, what, vocabulary_files(part))
    encoder = part.with_name(part.name.replace("tokenizer", "text_encoder"))
    tokenizer = load_tokenizer(kind, part, what)
    entry = read_json_object(part.parent / INDEX, what).get(encoder.name)
    reader = getattr(transformers, str(entry[1]), None) if isinstance(entry, list) else None
    if reader is None or reader.__name__ not in BY_HEADER or not encoder.is_dir():
        return
    config = _config(encoder, reader, "transformers", what).get_text_config()
    ends = kind.__name__.removesuffix("Fast") in ENDING
    check_size(tokenizer, config, part, what, ends=ends)
    if reader.__name__ in CHAT and not tokenizer.chat_template:
        raise UnreadableError(
            f"{what}: {part} has no chat template, which frames each prompt; it needs "
            "chat_template.jinja, or chat_template in tokenizer_config.json: fetch it again"
        )


def _check_scheduler(part: Path, kind: Any, what: str) -> None:
    config = read_json_object(part / "scheduler_config.json", what)
    try:
        kind.from_config(config)
    except Exception as error:  # whatever a wrong value meets first
        raise UnreadableError(
            f"{what}: {part}/scheduler_config.json describes no {kind.__name__} ({error})"
        ) from error


def _check_weights(part: Path, library: str, kind: Any, what: str) -> None:
    config = _config(part, kind, library, what)
    try:
        with torch.device("meta"):
            empty = kind.from_config(config) if library == "diffusers" else kind(config)
    except Exception as error:  # whatever a wrong value meets first
        raise UnreadableError(
            f"{what}: {part}/config.json describes no {kind.__name__} ({error})"
        ) from error
    path = weight_file(part, library, what)
    actual = {
        name: tensor for name, tensor in _read(path, what).items() if not name.endswith(BUFFERS)
    }
    wanted = _once(empty, actual)
    if library == "diffusers":
        actual = dict(empty._fix_state_dict_keys_on_load(actual))  # names of old attention layers
    else:
        actual, wanted = _without_prefix(actual), _without_prefix(wanted)
        if HEAD not in wanted:
            actual.pop(HEAD, None)
    if problem := misfit(actual, wanted) or quantised(actual):
        raise UnreadableError(f"{what}: {path} {problem}")


def _once(model: torch.nn.Module, actual: Mapping[str, Any]) -> dict[str, Any]:
    """A model's tensors; of one with several names, as T5's embedding, those that a file has."""
    names: dict[int, list[str]] = {}
    tensors = dict(model.state_dict(keep_vars=True))
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    kept = [[name for name in same if name in actual] or same[:1] for same in names.values()]
    return {name: tensors[name] for same in kept for name in same}


def _check_by_loading(part: Path, kind: Any, what: str) -> None:
    """Check a text encoder whose names only transformers itself can relate to a file's."""
    path = weight_file(part, "transformers", what)
    _read(path, what)
    try:
        _, report = kind.from_pretrained(
            part, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever a wrong value meets first
        raise UnreadableError(f"{what}: {part} holds no {kind.__name__} ({error})") from error
    if lacking := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise UnreadableError(
            f"{what}: {path} does not fit its architecture: missing, or of another shape, "
            f"{some(lacking)}"
        )


def quantised(actual: dict[str, TensorInfo]) -> str:
    """Which tensors are in a format that no weight is read from; empty if none."""
    for name, tensor in actual.items():
        if not tensor.is_floating:
            return (
                f"has {name} in {tensor.dtype}; weights are read in F32, F16, BF16 or F64, and "
                "quantised ones must be converted first"
            )
    return ""


def _read(path: Path, what: str) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except UnreadableError as error:
        raise UnreadableError(f"{what}: {error}") from error


def _config(part: Path, kind: Any, library: str, what: str) -> Any:
    """The configuration of a part as its class reads it."""
    values = read_json_object(part / "config.json", what)
    described = values.get("_class_name", kind.__name__)
    if described != kind.__name__:
        raise UnreadableError(
            f"{what}: {part}/config.json describes a {described}, but {INDEX} says "
            f"{kind.__name__}; is it the file of another part?"
        )
    if library == "diffusers":
        return values
    try:
        return kind.config_class.from_pretrained(part, local_files_only=True)
    except Exception as error:  # whatever a wrong value meets first
        raise UnreadableError(
            f"{what}: {part}/config.json describes no {kind.__name__} ({error})"
        ) from error


def _without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    return {PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
