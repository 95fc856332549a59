"""The network of ImageReward (Xu et al. 2023) and CycleReward (Bahng et al. 2025), on BLIP.

A vision transformer reads the image; BERT reads the prompt and looks at the image in every
layer; a head scores what its first token has become. Both were published in BLIP's own classes,
which no longer run on current libraries; transformers' classes take the same weights.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)
from transformers.utils import logging

from data.models.tokenizer import load_tokenizer
from label.metrics.backbones import Pixels
from label.metrics.base import ResolvedMetric
from label.metrics.blip import Recipe
from label.metrics.state_dict import check_state, read_state
from label.metrics.weights import Weights, WeightsError

HEAD_SIZES = (1024, 128, 64, 16, 1)
"""Outputs of the head's layers; its input is as wide as the text model."""

BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)")
IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
PLAIN = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""BLIP's contrastive projections, which no reward uses, and a buffer of old checkpoints."""


class Blip:
    """A reward for image and prompt together; about -2.5 to 2 (ImageReward)."""

    def __init__(self, resolved: ResolvedMetric, recipe: Recipe, device: torch.device) -> None:
        assert resolved.weights is not None
        self.resolved = resolved
        self._recipe = recipe
        self._pixels = Pixels(resolved, device)
        self._network = _load(resolved.weights, self._recipe).to(device)
        self._network.set_dtype(self._pixels.dtype)
        self._tokenizer = _tokenizer(resolved)

    @torch.inference_mode()
    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Scores one to one, in fp32; NaN for an empty prompt."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True,
            max_length=self._recipe.num_tokens, return_tensors="pt",
        ).to(self._pixels.device)  # fmt: skip
        rewards = self._network(
            self._pixels(np.stack(images)), tokens.input_ids, tokens.attention_mask
        )
        scores = (rewards.cpu() - self._recipe.mean) / self._recipe.std
        empty = torch.tensor([not prompt.strip() for prompt in prompts])
        return torch.where(empty, math.nan, scores)


class BlipNetwork(nn.Module):
    """Image and prompt -> the head's output."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, recipe: Recipe) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        sizes = pairwise((text.config.hidden_size, *HEAD_SIZES))
        for number, (before, after) in zip(recipe.layers, sizes, strict=True):
            if recipe.gelu and layers:
                layers[f"gelu_before_{number}"] = nn.GELU()
            layers[str(number)] = nn.Linear(before, after)
        self.head = nn.Sequential(layers)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Number format of the transformers; the head stays in fp32."""
        self.vision.to(dtype)  # type: ignore[arg-type]
        self.text.to(dtype)  # type: ignore[arg-type]

    def forward(
        self,
        pixels: Float[Tensor, "row 3 side side"],
        tokens: Int[Tensor, "row token"],
        mask: Int[Tensor, "row token"],
    ) -> Float[Tensor, " row"]:
        """The head's output, not standardised; it reads the first token, [CLS]."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        # As a decoder, which its configuration says it is, [CLS] would see nothing of the prompt.
        read = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=image, is_decoder=False
        ).last_hidden_state
        rewards: Tensor = self.head(read[:, 0].float())
        return rewards.squeeze(-1)


# --- loading -------------------------------------------------------------------------------------


def configs(config: Mapping[str, Any]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Transformers' description of both halves; a decoder, because only that attends across."""
    text = BlipTextConfig(**config["text_config"] | {"is_decoder": True})
    return BlipVisionConfig(**config["vision_config"]), text


def blip_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A reward's weights under `BlipNetwork`'s names; unknown ones keep theirs."""
    return {_renamed(key): value for key, value in state.items() if not key.startswith(UNUSED)}


def _renamed(key: str) -> str:
    for theirs, ours in (("blip.text_encoder.", "text."), ("mlp.layers.", "head.")):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    inside = key.removeprefix("blip.visual_encoder.")
    if inside != key and inside in PLAIN:
        return f"vision.{PLAIN[inside]}"
    if inside != key and (match := BLOCK.fullmatch(inside)):
        return f"vision.encoder.layers.{match[1]}.{IN_BLOCK[match[2]]}.{match[3]}"
    return key


def empty_network(config: Mapping[str, Any], recipe: Recipe) -> BlipNetwork:
    """The network without memory for its weights: names and shapes."""
    vision, text = configs(config)
    with torch.device("meta"):
        return BlipNetwork(
            BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), recipe
        )


def _load(weights: Weights, recipe: Recipe) -> BlipNetwork:
    """The network with its weights, in fp32 on the CPU.

    Raises:
        WeightsError: The checkpoint is damaged, or not of this reward and size.
    """
    state = blip_to_hf(read_state(weights.tensors))
    check_state(weights.tensors, state, empty_network(weights.config, recipe).state_dict())
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    vision, text = configs(weights.config)
    network = BlipNetwork(
        BlipVisionModel.from_pretrained(
            None, config=vision, state_dict=_below("vision.", state), dtype=torch.float32
        ),
        BlipTextModel.from_pretrained(
            None, config=text, state_dict=_below("text.", state), dtype=torch.float32,
            add_pooling_layer=False,
        ),
        recipe,
    )  # fmt: skip
    network.head.load_state_dict(_below("head.", state))
    return network.eval().requires_grad_(False)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _tokenizer(resolved: ResolvedMetric) -> Any:
    assert resolved.weights is not None
    folder = resolved.weights.words[0].parent
    tokenizer = load_tokenizer(BertTokenizer, folder, f"metrics.{resolved.name}.tokenizer")
    vocab_size = resolved.weights.config["text_config"]["vocab_size"]
    if len(tokenizer) > vocab_size:
        raise WeightsError(
            f"metrics.{resolved.name}.tokenizer={resolved.spec.tokenizer} has "
            f"{len(tokenizer)} words, but the weights know {vocab_size}; the published rewards "
            "read with bert-base-uncased"
        )
    return tokenizer
