"""The network of MPS (Zhang et al. 2024): CLIP ViT-H/14 whose image looks at the prompt.

Of the prompt, the image sees only the tokens that have to do with a condition, a fixed list of
words for "overall preference". Which ones is decided by a threshold, relative to the prompt's most
related token. The published code takes that maximum over the whole batch, so that scores depend on
what else is in the batch; here it is the prompt's own, as in the published scripts, which score
one at a time.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from label.metrics.backbones import Pixels, exp_of, hf_clip, hf_tokenizer
from label.metrics.base import ResolvedMetric
from label.metrics.mps_layers import CrossModel, official_to_ours
from label.metrics.state_dict import check_state, read_state
from label.metrics.weights import Weights

PROMPTS = 8
"""Prompts that are read at a time."""


class Mps:
    """exp(logit_scale) times the cosine of the prompt with an image that has seen it."""

    def __init__(self, resolved: ResolvedMetric, device: torch.device) -> None:
        assert resolved.weights is not None
        self.resolved = resolved
        self._pixels = Pixels(resolved, device)
        self._network = _load(resolved.weights).to(device)
        self._network.set_dtype(self._pixels.dtype)
        self._tokenizer = hf_tokenizer(resolved.weights)
        self._context = resolved.weights.config["text_config"]["max_position_embeddings"]
        with torch.inference_mode():
            condition, _ = self._network.read(self._tokens([resolved.spec.condition]))
        self._condition = condition[0]

    @torch.inference_mode()
    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Scores one to one; NaN for an empty prompt. Each distinct prompt is read once."""
        distinct = list(dict.fromkeys(prompts))
        words, end = self._read(distinct)
        bias = visible(words, self._condition, self.resolved.spec.threshold)
        image = self._network.look(self._pixels(np.stack(images)))
        row = torch.tensor([distinct.index(text) for text in prompts], device=self._pixels.device)
        scores = self._network(image, words[row], end[row], bias[row]).cpu()
        empty = torch.tensor([not text.strip() for text in prompts])
        return torch.where(empty, math.nan, scores)

    def _read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """`MpsNetwork.read` in batches of one size, whatever the number of prompts."""
        filled = prompts + prompts[-1:] * (-len(prompts) % PROMPTS)
        parts = [
            self._network.read(self._tokens(filled[start : start + PROMPTS]))
            for start in range(0, len(filled), PROMPTS)
        ]
        words, end = (torch.cat(part)[: len(prompts)] for part in zip(*parts, strict=True))
        return words, end

    def _tokens(self, texts: list[str]) -> Int[Tensor, "text token"]:
        """Token ids, padded to the full context; the padding is not masked: MPS reads it, too."""
        tokens: Tensor = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._context,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return tokens.to(self._pixels.device)


class MpsNetwork(nn.Module):
    """The two halves of CLIP and the layers across them."""

    def __init__(self, clip: Any, cross: CrossModel) -> None:
        super().__init__()
        self.clip, self.cross = clip, cross
        self.scale = math.nan

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Number format of the matrix products; mask, angles and score stay in fp32."""
        self.scale = exp_of(self.clip.logit_scale)
        self.clip.to(dtype)
        self.cross.set_dtype(dtype)

    def read(
        self, tokens: Int[Tensor, "prompt token"]
    ) -> tuple[Float[Tensor, "prompt token dim"], Float[Tensor, "prompt dim"]]:
        """Each prompt's tokens, and its end token."""
        read = self.clip.text_model(input_ids=tokens)
        project = self.clip.text_projection
        return project(read.last_hidden_state), project(read.pooler_output)

    def look(self, pixels: Float[Tensor, "row 3 side side"]) -> Float[Tensor, "row patch dim"]:
        """The class token and the patches, projected without the last norm that CLIP applies."""
        hidden = self.clip.vision_model(pixel_values=pixels).last_hidden_state
        projected: Tensor = self.clip.visual_projection(hidden)
        return projected

    def forward(
        self,
        image: Float[Tensor, "row patch dim"],
        prompt: Float[Tensor, "row token dim"],
        end: Float[Tensor, "row dim"],
        bias: Float[Tensor, "row 1 1 token"],
    ) -> Float[Tensor, " row"]:
        """Scaled cosine of the image's class token with the prompt's end token."""
        mixed = self.cross(image, prompt, bias)[:, 0]
        cosine = functional.cosine_similarity(mixed.float(), end.float(), dim=-1)
        return self.scale * cosine


def visible(
    words: Float[Tensor, "prompt token dim"],
    condition: Float[Tensor, "other dim"],
    threshold: float,
) -> Float[Tensor, "prompt 1 1 token"]:
    """Which tokens of each prompt an image may see: 0 for those, -inf for the others.

    They are those whose best product with a token of the condition is more than `threshold` times
    that of the prompt's best token.
    """
    best = (words.float() @ condition.float().T).amax(dim=-1)
    seen = best / best.amax(dim=-1, keepdim=True) > threshold
    return torch.zeros_like(best).masked_fill(~seen, -math.inf)[:, None, None]


# --- loading -------------------------------------------------------------------------------------


def mps_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under `MpsNetwork`'s names; unknown ones keep theirs.

    They begin with `model.` and `cross_model.`, on the hub with `mps.` before that.
    """
    return {
        _renamed(key.removeprefix("mps.")): value
        for key, value in state.items()
        if not key.endswith(".position_ids")  # a buffer of old checkpoints
    }


def _renamed(key: str) -> str:
    if key.startswith("cross_model."):
        return f"cross.{official_to_ours(key.removeprefix('cross_model.'))}"
    return f"clip.{key.removeprefix('model.')}" if key.startswith("model.") else key


def empty_network(config: Mapping[str, Any]) -> MpsNetwork:
    """The network without memory for its weights: names and shapes."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**_clip(config)))
        return MpsNetwork(clip, CrossModel(config["projection_dim"], config["cross_config"]))


def _load(weights: Weights) -> MpsNetwork:
    """The network with its weights, in fp32 on the CPU.

    Raises:
        WeightsError: The checkpoint is damaged, or not of MPS and this size.
    """
    state = mps_to_ours(read_state(weights.tensors))
    check_state(weights.tensors, state, empty_network(weights.config).state_dict())
    clip, across = _below("clip.", state), _below("cross.", state)
    cross = CrossModel(weights.config["projection_dim"], weights.config["cross_config"])
    cross.load_state_dict(across)
    network = MpsNetwork(hf_clip(weights.tensors, _clip(weights.config), clip), cross)
    return network.eval().requires_grad_(False)


def _clip(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("projection_dim", "vision_config", "text_config")}


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
