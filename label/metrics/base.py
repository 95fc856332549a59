"""What a metric is: how it wants pictures prepared, and how a score is made of what it gets.

Most metrics compare embeddings, which are shared between metrics and rows. A metric that must see
picture and prompt together (the oracle, the rewards on BLIP) runs once per distinct
(picture, prompt). Higher is better for every metric.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from label.metrics.backbones import Tower
from label.metrics.registry import Identity


@runtime_checkable
class Metric(Protocol):
    """A scorer of (picture, prompt)."""

    @property
    def identity(self) -> Identity:
        """Its files, preprocessing and number format."""
        ...


@runtime_checkable
class EmbeddingMetric(Metric, Protocol):
    """Scores from a tower's embeddings."""

    @property
    def tower(self) -> Tower:
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
class PictureMetric(Metric, Protocol):
    """Scores a prepared picture and its prompt together."""

    def judge(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """Scores one to one; NaN for an empty prompt."""
        ...
