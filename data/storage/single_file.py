"""A single-file checkpoint as a diffusers folder: converted once by diffusers, then kept.

The folder lies in the user's cache and is named by the bytes that it was made from. A file has
weights alone, so configuration and tokenizers come from a folder of the same architecture.
"""

import fcntl
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.artifacts.atomic import fsync, remove, sha256_of
from data.artifacts.fingerprints import Fingerprints
from data.artifacts.readable import UnreadableError, read_json_object
from data.families import INDEX, check_whole, family_of
from data.models.family import ModelError
from data.models.safetensors_header import TensorInfo, read_header
from data.storage.hub import Wanted, resolve
from data.storage.paths import cache_folder, user_path

SUFFIX = ".safetensors"
UNET = "model.diffusion_model."
"""Begins the names of the UNet's tensors."""
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that neither training nor sampling from prompts uses."""
CONFIGS = ("*/*.json", "*/*.txt", INDEX)
"""What is fetched of a hub repository: no weights."""
NO_CONFIG = (
    " is no diffusers folder; a single file has weights alone, so give the folder of a model of "
    "its architecture, or a hub id owner/name@commit, or choose its group (model=sd15, sd21_512, "
    "sd21 or sdxl)"
)


def is_single_file(path: str) -> bool:
    """Whether `model.path` is one file instead of a folder or a hub id."""
    return path.endswith(SUFFIX) and not user_path(path, "model.path").is_dir()


def folder_of(path: str, config: str | None) -> Path:
    """The diffusers folder of the file `model.path`; `config` is `model.config`.

    Raises:
        ValueError: The file is damaged or of another architecture, or there is no configuration.
    """
    what, file = f"model.path={path}", user_path(path, "model.path")
    try:
        tensors = read_header(file)
    except UnreadableError as error:
        raise UnreadableError(f"{what}: {error}") from error
    source = _configs(config or "")
    folder = cache_folder() / "models" / f"{file.stem[:64]}-{_digest(file, source)[:16]}"
    with _alone(folder):
        if not folder.exists():
            _convert(what, file, tensors, source, folder)
    return folder


def _configs(config: str) -> Path:
    """The folder with configuration and tokenizers."""
    value, _, commit = config.partition("@")
    if config and user_path(config, "model.config").is_dir():  # the @ is of the path
        value, commit = config, ""
    wanted = Wanted(
        patterns=[CONFIGS],
        usable=lambda folder: (folder / INDEX).is_file(),
        missing=NO_CONFIG,
        revision="config, after an @",
    )
    return resolve("model.config", value, commit or None, wanted)


def _digest(file: Path, source: Path) -> str:
    """Over the file's bytes and the small files that are used with it."""
    remembered = Fingerprints(cache_folder() / "files.json")  # each stage asks again
    digest = hashlib.sha256(remembered(file).encode())
    for path in sorted(path for pattern in CONFIGS for path in source.glob(pattern)):
        digest.update(f"{path.relative_to(source)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of this machine convert; the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(
    what: str, file: Path, tensors: dict[str, TensorInfo], source: Path, folder: Path
) -> None:
    """Write the folder whole or not at all."""
    index = read_json_object(source / INDEX, "model.config")
    family = family_of(f"model.config={source}", index)
    if family.pipeline not in PIPELINES:
        raise ModelError(
            f"{what} is to be read as a {family.pipeline} (model.config={source}); single files "
            f"are read as {' or '.join(PIPELINES)}: give a diffusers folder of other models"
        )
    print(f"{what}: converting to a diffusers folder, once: {folder}", flush=True)
    started, partial = time.monotonic(), folder.with_name(f".{folder.name}.partial")
    remove(partial)
    try:
        with _without_warnings():
            pipeline = _load(family.pipeline, file, tensors, source)
            _check_unet(pipeline, tensors)
            pipeline.save_pretrained(partial)
        check_whole(partial, "as converted")
    except Exception as error:  # diffusers meets wrong names and shapes in many ways
        remove(partial)
        raise ModelError(
            f"{what} cannot be converted to a {family.pipeline} as {source} describes it: {error}"
        ) from error
    for path in partial.rglob("*"):
        fsync(path)
    partial.rename(folder)
    fsync(folder.parent)
    print(f"{what}: converted in {time.monotonic() - started:.0f} s", flush=True)


def _load(kind: str, file: Path, tensors: dict[str, TensorInfo], source: Path) -> Any:
    """The pipeline in the format of the file's tensors; fp32 where they have several."""
    import diffusers
    import torch

    formats = {tensor.dtype for name, tensor in tensors.items() if name.startswith(UNET)}
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    pipeline = getattr(diffusers, kind).from_single_file(
        file,
        config=str(source),
        local_files_only=True,
        dtype=halves.get(min(formats), torch.float32) if len(formats) == 1 else torch.float32,
        **dict.fromkeys(LEFT_OUT),
    )
    if "v_pred" in tensors:  # an empty tensor by which SDXL says so
        pipeline.scheduler = pipeline.scheduler.from_config(
            pipeline.scheduler.config,
            prediction_type="v_prediction",
            rescale_betas_zero_snr="ztsnr" in tensors,
        )
    return pipeline


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what diffusers logs of formats and classes: the result is checked."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_unet(pipeline: Any, tensors: dict[str, TensorInfo]) -> None:
    """Refuse what diffusers leaves out silently."""
    in_file = sum(name.startswith(UNET) for name in tensors)
    if in_file != (in_model := len(pipeline.unet.state_dict())):
        raise ModelError(f"its UNet has {in_file} tensors, of which {in_model} were read")
