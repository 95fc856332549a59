"""The miniature world's judge: it looks at pixels and needs no weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from label.metrics.registry import ResolvedMetric


@dataclass(frozen=True, slots=True)
class Oracle:
    """How much of its prompt an image shows, in [0, 1]."""

    identity: ResolvedMetric

    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """The mean clarity of the prompt's attributes.

        Raises:
            ValueError: A prompt that is no sentence of the miniature world.
        """
        from data.miniature.oracle import oracle  # the renderer is only for the miniature

        scores = [
            oracle(pixels, prompt) if prompt.strip() else math.nan
            for pixels, prompt in zip(images, prompts, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)
