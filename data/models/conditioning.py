"""Text encoders, and each distinct prompt encoded once.

A prompt is encoded as the family's own pipeline encodes it, in training as in sampling; how, is
said in `data/families/`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.devices import to_device
from data.models.family import PromptEmbeds

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
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length or self.context,
            return_tensors="pt",
        )
        return self.model(to_device(tokens.input_ids, self.model.device), **options)


def encode_distinct(
    encode: EncodePrompts, prompts: Sequence[str], device: torch.device
) -> PromptEmbeds:
    """Encode prompts, one row each; each distinct prompt is encoded once."""
    distinct = sorted(set(prompts))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    return encode(distinct).rows(to_device(rows, device))
