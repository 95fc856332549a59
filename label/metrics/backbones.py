"""Backbones: images and prompts -> unit vectors in one space.

A backbone is loaded once and serves every metric that names the same weights.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from data.models.tokenizer import check_size, load_tokenizer
from label.metrics.base import BackboneFamily, ResolvedMetric
from label.metrics.state_dict import check_state, load_exactly, read_state
from label.metrics.weights import Weights, WeightsError


@runtime_checkable
class Backbone(Protocol):
    """Embeds prepared images and prompts; embeddings are fp32 of length 1, on its device.

    The device may still be computing them; reading them waits (`batching.AsyncCopy`).
    """

    @property
    def logit_scale(self) -> float:
        """The trained temperature, exp(logit_scale) of CLIP (Radford et al. 2021)."""
        ...

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        ...

    def embed_images(self, images: np.ndarray) -> Float[Tensor, "image dim"]:
        """Embed images (image, height, width, 3) as an `ImageTransform` prepared them."""
        ...

    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "prompt dim"]:
        """Embed prompts, cut where the context ends."""
        ...


def load_backbone(
    resolved: ResolvedMetric, device: torch.device, compiled: bool = False
) -> Backbone:
    """The backbone that a metric names, on the device; compiled for the one shape of its batches.

    Raises:
        WeightsError: The checkpoint is damaged or does not fit its architecture.
    """
    is_open_clip = resolved.family is BackboneFamily.open_clip
    backbone = OpenClipBackbone if is_open_clip else HfClipBackbone
    return backbone(resolved, device, compiled)


class MetricLoader:
    """What a kind's `load` is given: the device, and backbones that metrics share."""

    def __init__(self, device: torch.device, compiled: bool = False) -> None:
        self.device = device
        self._compiled = compiled
        self._backbones: dict[tuple[str, ...], Backbone] = {}

    def backbone(self, resolved: ResolvedMetric) -> Backbone:
        """The backbone that a metric names, loaded when the first metric asks for it."""
        key = resolved.backbone_key
        if key not in self._backbones:
            self._backbones[key] = load_backbone(resolved, self.device, self._compiled)
        return self._backbones[key]


class Pixels:
    """Turns prepared images into the input of a vision model."""

    def __init__(self, resolved: ResolvedMetric, device: torch.device) -> None:
        mean, std = resolved.normalisation
        self.device = device
        self.dtype = resolved.dtype.torch
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def __call__(self, images: np.ndarray) -> Float[Tensor, "image 3 side side"]:
        """Channels first, scaled to [0, 1] where they are uint8, and normalised."""
        pixels = torch.from_numpy(images)
        if self.device.type == "cuda":  # only pinned memory is copied while the device computes
            pixels = pixels.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True)
        pixels = pixels.permute(0, 3, 1, 2)
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(255).sub_(self._mean)
        else:
            pixels = pixels - self._mean
        return pixels.div_(self._std).to(self.dtype)


class HfClipBackbone:
    """`transformers.CLIPModel`: CLIP, PickScore, and the backbone of LAION's aesthetic head."""

    def __init__(
        self, resolved: ResolvedMetric, device: torch.device, compiled: bool = False
    ) -> None:
        assert resolved.weights is not None
        self._pixels = Pixels(resolved, device)
        model = _hf_model(resolved.weights)
        self._scale = exp_of(model.logit_scale)
        self._model = model.to(device, self._pixels.dtype)
        self._see = _ready(self._model.get_image_features, compiled)
        self._tokenizer = hf_tokenizer(resolved.weights)
        self._repairs = resolved.repairs_prompts
        self._context = self._model.config.text_config.max_position_embeddings

    @property
    def logit_scale(self) -> float:
        """exp(logit_scale)."""
        return self._scale

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self._model.config.projection_dim)

    @torch.inference_mode()
    def embed_images(self, images: np.ndarray) -> Float[Tensor, "image dim"]:
        """Unit image embeddings; transformers 5 keeps them in `pooler_output`."""
        output = self._see(pixel_values=self._pixels(images))
        return functional.normalize(output.pooler_output.float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "prompt dim"]:
        """Unit text embeddings; padded to the full context, so that no prompt affects another."""
        if self._tokenizer is None:
            raise WeightsError("this CLIP folder has no tokenizer, so it cannot read prompts")
        texts = [repaired(prompt) for prompt in prompts] if self._repairs else list(prompts)
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._context,
            return_tensors="pt",
        ).to(self._pixels.device)  # fmt: skip
        output = self._model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
        return functional.normalize(output.pooler_output.float(), dim=-1)


def exp_of(logit_scale: Tensor) -> float:
    """The factor of a score, read before the weights are rounded: bf16 makes 98.9 of 100."""
    return float(logit_scale.float().exp())


def repaired(prompt: str) -> str:
    """A prompt as OpenAI's and open_clip's tokenizers clean it before they read."""
    from open_clip.tokenizer import basic_clean

    clean: str = basic_clean(prompt)
    return clean


class OpenClipBackbone:
    """An open_clip CLIP: HPSv2 and HPSv2.1."""

    def __init__(
        self, resolved: ResolvedMetric, device: torch.device, compiled: bool = False
    ) -> None:
        assert resolved.weights is not None
        self._pixels = Pixels(resolved, device)
        model = _open_clip_model(resolved.weights)
        self._scale = exp_of(model.logit_scale)
        self._model = model.to(device, self._pixels.dtype)
        self._see = _ready(self._model.encode_image, compiled)
        self._tokenizer = _open_clip_tokenizer(resolved.weights)
        self._dim = int(resolved.weights.config["model_cfg"]["embed_dim"])

    @property
    def logit_scale(self) -> float:
        """exp(logit_scale)."""
        return self._scale

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self._dim

    @torch.inference_mode()
    def embed_images(self, images: np.ndarray) -> Float[Tensor, "image dim"]:
        """Unit image embeddings."""
        embeddings = self._see(self._pixels(images))
        return functional.normalize(embeddings.float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "prompt dim"]:
        """Unit text embeddings."""
        tokens: Int[Tensor, "prompt token"] = self._tokenizer(list(prompts))
        embeddings = self._model.encode_text(tokens.to(self._pixels.device))
        return functional.normalize(embeddings.float(), dim=-1)


def _ready(forward: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=False) if compiled else forward


# --- loading -------------------------------------------------------------------------------------


def _hf_model(weights: Weights) -> Any:
    state = read_state(weights.tensors)
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    config = {key: value for key, value in weights.config.items() if key != "preprocess"}
    return hf_clip(weights.tensors, config, state)


def hf_clip(path: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """A `transformers.CLIPModel` in fp32 on the CPU with these weights, read from `path`.

    Raises:
        WeightsError: They do not fit the architecture.
    """
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    try:
        described = CLIPConfig(**config)
        with torch.device("meta"):
            wanted = CLIPModel(described).state_dict()
    except Exception as error:  # whatever a wrong value meets first
        raise WeightsError(f"{path.parent}/config.json describes no CLIPModel ({error})") from error
    check_state(path, state, wanted)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = CLIPModel.from_pretrained(
        None, config=described, state_dict=dict(state), dtype=torch.float32
    )
    model.train(False)
    model.requires_grad_(False)
    return model


def hf_tokenizer(weights: Weights) -> Any:
    """The CLIP tokenizer that belongs to these weights; None where there is none."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    if not weights.words:
        return None
    folder = weights.words[0].parent
    tokenizer = load_tokenizer(CLIPTokenizer, folder, str(weights.tensors))
    config = CLIPTextConfig(**weights.config.get("text_config") or {})
    check_size(tokenizer, config, folder, str(weights.tensors))
    return tokenizer


def _open_clip_model(weights: Weights) -> Any:
    from open_clip.model import CLIP

    try:
        model = CLIP(**weights.config["model_cfg"])
    except Exception as error:  # whatever a wrong value meets first
        raise WeightsError(
            f"{weights.where} describes no CLIP with plain transformers: {error}"
        ) from error
    state = read_state(weights.tensors)
    if weights.tensors.suffix != ".safetensors":
        state.pop("attn_mask", None)  # old pickles carry the causal mask
    load_exactly(model, weights.tensors, state)
    return model.eval().requires_grad_(False)


def _open_clip_tokenizer(weights: Weights) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    context = weights.config["model_cfg"]["text_cfg"].get("context_length", 77)
    merges = [{"bpe_path": str(path)} for path in weights.files if path.suffix == ".gz"]
    tokenizer = SimpleTokenizer(**(merges[0] if merges else {}), context_length=context)
    words = weights.config["model_cfg"]["text_cfg"].get("vocab_size", 49408)  # open_clip's default
    if tokenizer.vocab_size != words:
        raise WeightsError(
            f"{weights.where}: the tokenizer has {tokenizer.vocab_size} words, but the weights "
            f"know {words}; its merges (*.gz) are incomplete or of another model"
        )
    return tokenizer
