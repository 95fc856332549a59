"""The scorers of a run, loaded together so that they share their backbones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.artifacts.fingerprints import Fingerprints
from label.config import MetricSpec
from label.metrics.backbones import MetricLoader
from label.metrics.protocols import Metric
from label.metrics.registry import load, resolve_all, settle_dtypes
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.scoring_pass import Clock, ImageEncoder, ScoringPass


class Panel:
    """Metrics by name; higher is better for every one of them."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = dict(metrics)

    @classmethod
    def load(
        cls, specs: Mapping[str, MetricSpec], device: torch.device, *, compiled: bool = False
    ) -> "Panel":
        """Load the metrics; equal backbones are loaded once, and compiled by torch if wanted.

        Raises:
            ValueError: A kind is unknown, or weights are missing (both noticed before any is
                loaded), damaged, of another architecture, or not those that are pinned.
        """
        resolved = resolve_all(settle_dtypes(specs, on_gpu=device.type == "cuda"))
        for metric in resolved:
            metric.check_sha256()
        loader = MetricLoader(device, compiled)
        return cls({one.name: load(one, loader) for one in resolved})

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
        """Begin a pass over rows; an encoder, where there is one, sees their images, too."""
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
        with DecodePool(workers, most_threads=workers) as pool:
            scoring = self.start(pool, Batch(batch, is_checked=False))
            rows = [scoring.add(*row) for row in zip(images, prompts, strict=True)]
            scoring.flush()
        return scoring.scores(rows)

    def provenance(self) -> dict[str, Any]:
        """Per metric: where its weights are, their hashes, preprocessing and number format."""
        fingerprints = Fingerprints()
        return {
            name: metric.resolved.settings(fingerprints)
            | {
                "path": metric.resolved.spec.weights,
                "revision": metric.resolved.spec.revision,
                "head_path": metric.resolved.spec.head,
                "tokenizer_path": metric.resolved.spec.tokenizer,
                "tokenizer_revision": metric.resolved.spec.tokenizer_revision,
            }
            for name, metric in self._metrics.items()
        }
