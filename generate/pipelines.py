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
from data.families import check_whole, families, find_family
from data.images import Size
from data.models.adapter import check_adapter, down_matrices
from data.models.family import Family, FlowFamily, ModelConfig
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
        index = check_whole(Path(model.path), f"model {model.name!r}")
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
            folder, dtype=dtype.torch, use_safetensors=True, **left_out(folder)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries' errors have no common base
        raise SamplesError(
            f"model {model.name!r} ({model.path}) cannot be loaded: {error}"
        ) from error
    family = family_of_pipeline(pipeline)
    parts = ("unet" if family is None else family.denoiser, "vae")
    if not all(hasattr(pipeline, part) for part in parts):
        allowed = ", ".join(family.pipeline for family in families())
        raise SamplesError(
            f"model {model.name!r} ({model.path}) is a {type(pipeline).__name__}; needed is one of "
            f"{allowed}, or another pipeline with a UNet and a VAE"
        )
    _limit_prompts(pipeline)
    if model.adapter:
        _load_adapter(pipeline, model)
    return pipeline


def family_of_pipeline(pipeline: Any) -> Family | None:
    """The family of a loaded pipeline; None for those that can only be sampled."""
    return find_family({"_class_name": type(pipeline).__name__})


def denoiser_of(pipeline: Any) -> Any:
    """A pipeline's denoiser."""
    family = family_of_pipeline(pipeline)
    return getattr(pipeline, "unet" if family is None else family.denoiser)


def latent_shape(pipeline: Any, size: Size) -> tuple[int, int, int]:
    """Channels, height and width of a pipeline's latents of images of a size."""
    family, config = family_of_pipeline(pipeline), denoiser_of(pipeline).config
    height, width = (side // pipeline.vae_scale_factor for side in (size.height, size.width))
    if family is None:
        return config.in_channels, height, width
    files = ModelConfig(index={}, denoiser=config, vae={}, scheduler={})
    return family.latent_channels(files), height, width


def keep_latents_in_fp32(pipeline: Any) -> None:
    """Let guidance and scheduler compute in fp32, whatever format the networks compute in.

    Latents in bf16 would be rounded to 8 bits at each of the steps. Denoiser and VAE get them in
    their own format; in fp32 nothing changes.
    """
    denoiser = denoiser_of(pipeline)
    first_of_vae = getattr(pipeline.vae, "post_quant_conv", None) or pipeline.vae.decoder
    for module in (denoiser, first_of_vae):
        module.register_forward_pre_hook(_to_own_format, with_kwargs=True)
    denoiser.register_forward_hook(_to_fp32)


def _to_own_format(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first argument, which the pipelines of transformers pass by its name."""
    dtype = next(module.parameters()).dtype
    if args:
        return (_cast(args[0], dtype), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _cast(kwargs["hidden_states"], dtype)}


def _to_fp32(_: torch.nn.Module, __: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_cast(output[0], torch.float32), *output[1:])


def _cast(latents: Any, dtype: torch.dtype) -> Any:
    """Latents in a number format; Z-Image's are a list of images."""
    if isinstance(latents, list):
        return [one.to(dtype) for one in latents]
    return latents.to(dtype)


def _download(model: Model) -> str:
    """Fetch a hub id at its commit, or take it from the cache; what came is checked as a folder."""
    folder = str(
        DiffusionPipeline.download(model.path, revision=model.revision, use_safetensors=True)
    )
    _check_text_to_image(model, check_whole(Path(folder), f"model {model.name!r}"))
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
            "of diffusers with a UNet and a VAE, such as StableDiffusionPipeline, or one of "
            f"{', '.join(one.pipeline for one in families() if isinstance(one, FlowFamily))}"
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
            f"model {model.name!r}: {file} has no LoRA weights for the denoiser or the text "
            f"encoders of {model.path}; give the base that it was made for (model.path=...)"
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


def left_out(folder: str) -> dict[str, Any]:
    """Options for the parts that are not loaded.

    They are those that the folder does without, which diffusers wants to be told, and Stable
    Diffusion's checker, which replaces images by black ones.
    """
    path = Path(folder) / "model_index.json"
    index = read_json_object(path) if path.is_file() else {}
    family = find_family(index)
    absent = () if family is None else set(family.parts) - set(family.parts_in(index))
    options: dict[str, Any] = dict.fromkeys(absent)
    if "safety_checker" in index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    return options
