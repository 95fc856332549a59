"""The condition of a UNet: encoded text, and for SDXL the image's sizes.

A prompt is encoded as the family's own pipeline encodes it, in training as in sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.images import central_square
from train.loader.device_copy import to_device


@dataclass(frozen=True, slots=True)
class Condition:
    """What a UNet is conditioned on, one row for each image."""

    states: Float[Tensor, "image token width"]
    added: dict[str, Tensor] | None = None
    """`added_cond_kwargs` of the UNet: SDXL's pooled text and time ids."""


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Encoded prompts."""

    states: Float[Tensor, "prompt token width"]
    pooled: Float[Tensor, "prompt pooled"] | None = None
    """SDXL's summary of the whole prompt."""

    def rows(self, index: Int[Tensor, " row"]) -> "PromptEmbeds":
        """Some rows, in any order and number."""
        return PromptEmbeds(self.states[index], None if self.pooled is None else self.pooled[index])

    def twice(self) -> "PromptEmbeds":
        """All rows for the winners, and once more for the losers."""
        pooled = None if self.pooled is None else torch.cat([self.pooled, self.pooled])
        return PromptEmbeds(torch.cat([self.states, self.states]), pooled)


TextEncoder = Callable[[Sequence[str]], PromptEmbeds]
"""How a family encodes prompts; repeated prompts are encoded repeatedly."""


@dataclass(frozen=True, slots=True)
class ClipEncoder:
    """A CLIP text encoder and its tokenizer."""

    tokenizer: Any
    model: Any

    @property
    def context(self) -> int:
        """Tokens of a prompt; the tokenizer may allow fewer than the model, or name no limit."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    def __call__(self, prompts: Sequence[str], **options: bool) -> Any:
        """The model's output for whole prompts, cut or padded to its context."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        return self.model(to_device(tokens.input_ids, self.model.device), **options)


@dataclass(frozen=True, slots=True)
class OneEncoder:
    """SD1.x and SD2.x: the last layer's states after their norm."""

    tower: ClipEncoder

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode each prompt."""
        return PromptEmbeds(self.tower(prompts)[0])


@dataclass(frozen=True, slots=True)
class TwoEncoders:
    """SDXL (Podell et al. 2023, section 2.1): both last-but-one layers side by side.

    The pooled text is the projected end token of the second tower.
    """

    first: ClipEncoder
    second: ClipEncoder
    zeros_for_empty: bool
    """Whether an empty prompt is encoded as zeros; from the pipeline's configuration."""

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode each prompt."""
        outputs = [tower(prompts, output_hidden_states=True) for tower in (self.first, self.second)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[1].text_embeds
        if self.zeros_for_empty:
            empty = to_device(torch.tensor([not prompt for prompt in prompts]), states.device)
            states = states.masked_fill(empty.view(-1, 1, 1), 0)
            pooled = pooled.masked_fill(empty.view(-1, 1), 0)
        return PromptEmbeds(states, pooled)


def encode_distinct(
    encode: TextEncoder, prompts: Sequence[str], device: torch.device
) -> PromptEmbeds:
    """Encode prompts, one row each; each distinct prompt is encoded once."""
    distinct = sorted(set(prompts))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    return encode(distinct).rows(to_device(rows, device))


def condition(
    text: PromptEmbeds, size: Int[Tensor, "image 2"], side: int, device: torch.device
) -> Condition:
    """Condition images, one row each: the text, and the sizes if the family uses them."""
    if text.pooled is None:
        return Condition(text.states)
    ids = to_device(time_ids(size, side), device)
    return Condition(text.states, {"text_embeds": text.pooled, "time_ids": ids})


def time_ids(size: Int[Tensor, "image 2"], side: int) -> Float[Tensor, "image 6"]:
    """SDXL's size and crop conditioning (Podell et al. 2023, section 2.2).

    Original height and width; top and left of the crop, counted in pixels of the resized image
    (the convention that SDXL was trained with); target height and width. They stay float32: in
    bf16 sizes above 256 would be rounded. For a mirrored image the left edge is that before
    mirroring, which is off by at most one pixel because crops are central.
    """
    rows = []
    for height, width in size.tolist():
        cut = central_square(width, height, side)
        rows.append([height, width, cut.top, cut.left, side, side])
    return torch.tensor(rows, dtype=torch.float32).view(-1, 6)
