"""Text encoders, and each distinct prompt encoded once.

A prompt is encoded as the family's own pipeline encodes it, in training as in sampling; how, is
said in `data/families/`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from data.devices import to_device
from data.models.family import Family, ModelConfig, PromptEmbeds

EncodePrompts = Callable[[Sequence[str]], PromptEmbeds]
"""How a model encodes prompts; repeated prompts are encoded repeatedly."""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder and its tokenizer."""

    tokenizer: Any
    model: Any

    @property
    def context(self) -> int:
        """Tokens of a prompt; the tokenizer may allow fewer than the model, or name no limit."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    def __call__(self, prompts: Sequence[str], length: int | None = None, **options: bool) -> Any:
        """The model's output for whole prompts, cut or padded to `length` or to its context."""
        tokens = self._tokens(prompts, max_length=length or self.context, padding="max_length")
        return self.model(to_device(tokens.input_ids, self.model.device), **options)

    def masked(
        self, texts: Sequence[str], options: Mapping[str, Any] | None = None, **tokenizing: Any
    ) -> tuple[Any, Int[Tensor, "text token"]]:
        """The output of a model that is told which tokens are padding, and its mask: 1 or 0.

        `options` are the model's, `tokenizing` those of the tokenizer.
        """
        tokens = self._tokens(texts, **tokenizing)
        ids, mask = (
            to_device(one, self.model.device) for one in (tokens.input_ids, tokens.attention_mask)
        )
        return self.model(input_ids=ids, attention_mask=mask, **options or {}), mask

    def _tokens(self, texts: Sequence[str], **tokenizing: Any) -> Any:
        return self.tokenizer(list(texts), truncation=True, return_tensors="pt", **tokenizing)


def load_text_encoders(
    folder: Path, family: Family, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, TextEncoder]:
    """The frozen text encoders of a diffusers folder, by the names of their parts."""
    encoders = {}
    for name in filter(config.has, family.text_encoders):
        beside = name.replace("text_encoder", "tokenizer")
        tokenizer, kind = (
            getattr(transformers, str(config.index[part][1])) for part in (beside, name)
        )
        model = kind.from_pretrained(
            folder, subfolder=name, torch_dtype=dtype, use_safetensors=True
        )
        encoders[name] = TextEncoder(
            tokenizer.from_pretrained(folder, subfolder=beside),
            model.to(device).eval().requires_grad_(requires_grad=False),
        )
    return encoders


def encode_distinct(encode: EncodePrompts, prompts: Sequence[str]) -> PromptEmbeds:
    """Encode prompts, one row each; each distinct prompt is encoded once."""
    distinct = sorted(set(prompts))
    embeds = encode(distinct)
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    return embeds.rows(to_device(rows, embeds.states.device))
