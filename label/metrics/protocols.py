"""What a loaded metric can do: turn images and prompts into scores. Higher is always better.

Most metrics compare embeddings, which are shared between metrics and rows. A metric that must see
image and prompt together (the oracle, the rewards on BLIP) runs once per distinct
(image, prompt).
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from label.metrics.backbones import Backbone
from label.metrics.base import ResolvedMetric


@runtime_checkable
class Metric(Protocol):
    """A scorer of (image, prompt)."""

    @property
    def resolved(self) -> ResolvedMetric:
        """Its files, preprocessing and number format."""
        ...


@runtime_checkable
class EmbeddingMetric(Metric, Protocol):
    """Scores from the embeddings of a backbone."""

    @property
    def backbone(self) -> Backbone:
        """The backbone, shared with every metric that names the same weights."""
        ...

    @property
    def reads_prompt(self) -> bool:
        """Whether prompts have to be embedded for it."""
        ...

    def score(
        self, images: Float[Tensor, "row dim"], texts: Float[Tensor, "row dim"]
    ) -> Float[Tensor, " row"]:
        """Scores of unit embeddings, row by row, in fp32."""
        ...


@runtime_checkable
class CrossMetric(Metric, Protocol):
    """Scores a prepared image and its prompt together."""

    def judge(
        self, images: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> Float[Tensor, " row"] | Float[np.ndarray, " row"]:
        """Scores one to one, in fp32; NaN for an empty prompt."""
        ...
