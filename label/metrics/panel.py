"""The scorers of a run, loaded together so that they share their backbones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from label.config import MetricKind, MetricSpec
from label.metrics.aesthetic import Aesthetic, check_head, load_head
from label.metrics.backbones import Backbone, load_backbone
from label.metrics.base import CrossMetric, Metric
from label.metrics.blip_reward import Blip
from label.metrics.clip_score import ON_EMBEDDINGS, CosineMetric
from label.metrics.fingerprints import Fingerprints
from label.metrics.hps_v3 import HpsV3
from label.metrics.mps import Mps
from label.metrics.oracle import Oracle
from label.metrics.registry import ResolvedMetric, resolve
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.scoring_pass import Clock, ImageEncoder, ScoringPass

ON_BOTH: dict[MetricKind, type[Blip | Mps | HpsV3]] = {
    MetricKind.image_reward: Blip,
    MetricKind.cycle_reward: Blip,
    MetricKind.mps: Mps,
    MetricKind.hps_v3: HpsV3,
}
"""Metrics that see image and prompt together, each with a network of its own."""


class Panel:
    """Metrics by name; higher is better for every one of them."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = dict(metrics)

    @classmethod
    def load(
        cls, specs: Mapping[str, MetricSpec], device: torch.device, *, compiled: bool = False
    ) -> "Panel":
        """Load the metrics; equal backbones are loaded once, and are `compiled` by torch if asked.

        Raises:
            WeightsError: Weights are missing (said before any is loaded), damaged, of another
                architecture, or not those that are pinned.
        """
        identities = [resolve(name, spec) for name, spec in specs.items()]
        for identity in identities:
            identity.check_sha256()
        towers: dict[tuple[str, ...], Backbone] = {}
        return cls({one.name: _load(one, towers, device, compiled) for one in identities})

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics' names, in the order in which they were given."""
        return tuple(self._metrics)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics themselves."""
        return self._metrics

    def only(self, names: Sequence[str]) -> "Panel":
        """A panel of some of these metrics; nothing is loaded again."""
        return Panel({name: self._metrics[name] for name in names})

    def start(
        self,
        decoder: DecodePool,
        batch: Batch,
        clock: Clock | None = None,
        cache_bytes: int = 0,
        encoder: ImageEncoder | None = None,
    ) -> ScoringPass:
        """Begin a pass over rows; an encoder sees their images, too."""
        return ScoringPass(self._metrics, decoder, batch, clock or Clock(), cache_bytes, encoder)

    def score(
        self,
        images: Sequence[bytes],
        prompts: Sequence[str],
        *,
        batch: int = 64,
        workers: int = 0,
    ) -> dict[str, np.ndarray]:
        """Score images (encoded, any format) against their prompts, one to one.

        Returns:
            Metric -> float32 scores in the order of `images`; NaN where one is unreadable.
        """
        with DecodePool(workers) as pool:
            scoring = self.start(pool, Batch(batch, is_checked=False))
            rows = [scoring.add(*row) for row in zip(images, prompts, strict=True)]
            scoring.flush()
        return scoring.scores(rows)

    def provenance(self) -> dict[str, Any]:
        """Per metric: where its weights are, their hashes, preprocessing and number format."""
        fingerprints = Fingerprints()
        return {
            name: metric.identity.settings(fingerprints)
            | {
                "path": metric.identity.spec.weights,
                "revision": metric.identity.spec.revision,
                "head_path": metric.identity.spec.head,
                "tokenizer_path": metric.identity.spec.tokenizer,
                "tokenizer_revision": metric.identity.spec.tokenizer_revision,
            }
            for name, metric in self._metrics.items()
        }


def _load(
    identity: ResolvedMetric,
    towers: dict[tuple[str, ...], Backbone],
    device: torch.device,
    compiled: bool,
) -> Metric:
    """One metric, on a tower that is there already or is loaded now."""
    kind = identity.spec.kind
    if kind is MetricKind.oracle:
        return Oracle(identity)
    if kind in ON_BOTH:
        judge: CrossMetric = ON_BOTH[kind](identity, device)
        return judge
    head = load_head(identity.head) if identity.head else None  # cheap, so wrong ones fail early
    if identity.tower not in towers:
        towers[identity.tower] = load_backbone(identity, device, compiled)
    tower = towers[identity.tower]
    if head is not None:
        check_head(identity, head, tower.dim)
        return Aesthetic(identity, tower, head)
    assert kind in ON_EMBEDDINGS
    return CosineMetric(identity, tower)
