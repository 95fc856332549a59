"""Loads a diffusers pipeline whole, with LoRA weights if there are any, or refuses it by name."""

from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from data.artifacts.readable import read_json_object
from data.devices import Dtype
from data.models.adapter import check_adapter, down_matrices
from data.models.folder import check_model_folder
from generate.image_files import Model, SamplesError

ARGUMENTS = (
    "prompt", "latents", "generator", "output_type", "height", "width", "num_inference_steps",
    "guidance_scale",
)  # fmt: skip
"""What a pipeline is called with."""


def check_model(model: Model) -> None:
    """Refuse a model of this machine that is damaged or incomplete; loads no weight.

    Raises:
        ValueError: Names the model, the file, what is wrong with it, and what to do.
    """
    if model.is_local:
        index = check_model_folder(Path(model.path), f"model {model.name!r}")
        _check_text_to_image(model, index)
    if model.adapter:
        check_adapter(Path(model.adapter), f"model {model.name!r}")


def load_pipeline(model: Model, dtype: Dtype) -> Any:
    """A model's pipeline on the CPU, with its LoRA weights; checked before it is loaded.

    Raises:
        ValueError: Names the model, the file, what is wrong with it, and what to do.
    """
    check_model(model)
    try:
        folder = model.path if model.is_local else _download(model)
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=dtype.torch, use_safetensors=True, **_without_safety_checker(folder)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries' errors have no common base
        raise SamplesError(
            f"model {model.name!r} ({model.path}) cannot be loaded: {error}"
        ) from error
    if not all(hasattr(pipeline, part) for part in ("unet", "vae")):
        raise SamplesError(
            f"model {model.name!r} ({model.path}) is a {type(pipeline).__name__}; needed is a "
            "pipeline with a UNet and a VAE"
        )
    _limit_prompts(pipeline)
    if model.adapter:
        _load_adapter(pipeline, model)
    return pipeline


def keep_latents_in_fp32(pipeline: Any) -> None:
    """Let guidance and scheduler compute in fp32, whatever format the networks compute in.

    Latents in bf16 would be rounded to 8 bits at each of the steps. UNet and VAE get them in their
    own format; in fp32 nothing changes.
    """
    first_of_vae = getattr(pipeline.vae, "post_quant_conv", None) or pipeline.vae.decoder
    for module in (pipeline.unet, first_of_vae):
        module.register_forward_pre_hook(_to_own_format)
    pipeline.unet.register_forward_hook(_to_fp32)


def _to_own_format(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(next(module.parameters()).dtype), *args[1:])


def _to_fp32(_: torch.nn.Module, __: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    return (output[0].float(), *output[1:])


def _download(model: Model) -> str:
    """Fetch a hub id at its commit, or take it from the cache; what came is checked as a folder."""
    folder = str(
        DiffusionPipeline.download(model.path, revision=model.revision, use_safetensors=True)
    )
    _check_text_to_image(model, check_model_folder(Path(folder), f"model {model.name!r}"))
    return folder


def _check_text_to_image(model: Model, index: dict[str, Any]) -> None:
    """Refuse a pipeline that makes images of something else than prompts and noise.

    Raises:
        SamplesError: Names its class.
    """
    name = str(index.get("_class_name"))
    kind = getattr(diffusers, name, None)
    accepted = signature(kind.__call__).parameters if isinstance(kind, type) else {}
    if not {*ARGUMENTS} <= accepted.keys() or "image" in accepted:
        raise SamplesError(
            f"model {model.name!r} ({model.path}) is a {name}; needed is a text-to-image pipeline "
            "of diffusers with a UNet and a VAE, such as StableDiffusionPipeline"
        )


def _limit_prompts(pipeline: Any) -> None:
    """Cut prompts where the text encoder's context ends, if the tokenizer names no limit."""
    for suffix in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        config = getattr(getattr(pipeline, f"text_encoder{suffix}", None), "config", None)
        context = getattr(config, "max_position_embeddings", None)
        if tokenizer is not None and isinstance(context, int):
            tokenizer.model_max_length = min(tokenizer.model_max_length, context)


def _load_adapter(pipeline: Any, model: Model) -> None:
    file = Path(model.adapter)
    try:
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, use_safetensors=True, local_files_only=True
        )
        loaded = pipeline.get_active_adapters()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # peft and diffusers meet wrong names in many ways
        raise SamplesError(
            f"model {model.name!r}: the LoRA weights {file} cannot be loaded on {model.path}: "
            f"{error}"
        ) from error
    if not loaded:
        raise SamplesError(
            f"model {model.name!r}: {file} has no LoRA weights for the UNet or the text encoders "
            f"of {model.path}; give the base that it was made for (model.path=...)"
        )
    with safe_open(file, framework="numpy") as weights:
        in_file = len(down_matrices(weights.keys()))
    if (in_model := _num_layers(pipeline)) != in_file:
        raise SamplesError(
            f"model {model.name!r}: {file} has LoRA weights for {in_file} layers, but only "
            f"{in_model} of them are in {model.path}; give the base that it was made for "
            "(model.path=...)"
        )


def _num_layers(pipeline: Any) -> int:
    """How many layers of a pipeline have LoRA weights."""
    modules = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    return sum(
        len(list(matrices.children()))  # one for each adapter
        for module in modules
        for layer in module.modules()
        if isinstance(matrices := getattr(layer, "lora_A", None), torch.nn.Module)
    )


def _without_safety_checker(folder: str) -> dict[str, Any]:
    """Options that leave out Stable Diffusion's checker, which replaces images by black ones."""
    index = Path(folder) / "model_index.json"
    if index.is_file() and "safety_checker" in read_json_object(index):
        return {"safety_checker": None, "requires_safety_checker": False}
    return {}
