"""Scores that are a cosine of two embeddings: CLIP score, HPSv2 and v2.1, PickScore."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from label.config import MetricKind
from label.metrics.backbones import Backbone
from label.metrics.registry import ResolvedMetric

ON_EMBEDDINGS = (MetricKind.clip, MetricKind.hps, MetricKind.pickscore)
"""The kinds that are scored here."""


@dataclass(frozen=True, slots=True)
class CosineMetric:
    """The cosine of image and prompt, in [-1, 1]; for PickScore times exp(logit_scale).

    CLIP score (Hessel et al. 2021) is meant without its prefix, clamp and factor. HPSv2's (Wu et
    al. 2023) published tables show it times 100. PickScore (Kirstain et al. 2023) gives about 17
    to 26 with the published weights, and its softmax over two images is the chance of each to be
    preferred.
    """

    identity: ResolvedMetric
    tower: Backbone
    reads_prompt: bool = True

    def score(
        self, images: Float[Tensor, "row dim"], texts: Float[Tensor, "row dim"]
    ) -> Float[Tensor, " row"]:
        """In fp32, of embeddings of length 1: HPSv2's own product in fp16 makes ties of 2e-4."""
        scaled = self.identity.spec.kind is MetricKind.pickscore
        cosine = (images * texts).sum(dim=-1)
        return self.tower.logit_scale * cosine if scaled else cosine
