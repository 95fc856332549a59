"""Scores that are a cosine of two embeddings: CLIP score, HPSv2 and v2.1, PickScore."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from label.metrics.backbones import Backbone
from label.metrics.base import ResolvedMetric


@dataclass(frozen=True, slots=True)
class CosineMetric:
    """The cosine of image and prompt, in [-1, 1]; times exp(logit_scale) where it is `scaled`."""

    resolved: ResolvedMetric
    backbone: Backbone
    scaled: bool = False
    reads_prompt: bool = True

    def score(
        self, images: Float[Tensor, "row dim"], texts: Float[Tensor, "row dim"]
    ) -> Float[Tensor, " row"]:
        """Scores in fp32 of unit embeddings: HPSv2's own product in fp16 makes ties of 2e-4."""
        cosine = (images * texts).sum(dim=-1)
        return self.backbone.logit_scale * cosine if self.scaled else cosine
