"""What a kind of metric declares, and what is known of a metric before it is loaded.

Nothing here imports torch: a run with nothing left to do answers at once, and missing weights are
reported before any are loaded. What a loaded metric can do is in `label.metrics.protocols`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from data.artifacts.atomic import sha256_of
from data.devices import Dtype
from data.storage.paths import user_path
from label.config import MetricSpec
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import Weights, WeightsError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's normalisation, which all published scorers of the family keep."""


class BackboneFamily(Enum):
    """Which library's classes a backbone is loaded into."""

    hf_clip = "hf_clip"
    open_clip = "open_clip"


@dataclass(frozen=True, slots=True)
class ResolvedMetric:
    """A metric whose files have been found, before any weight is loaded."""

    name: str
    spec: MetricSpec
    transform: ImageTransform
    """How it wants images prepared."""
    weights: Weights | None = None
    """Its checkpoint; None for a metric without weights."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """What else it reads (`head`, `template`); the name of each is recorded with its hash."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """What only this kind of metric can choose; recorded as it is."""
    family: BackboneFamily = BackboneFamily.hf_clip
    """For a metric that compares embeddings: which classes its backbone is loaded into."""
    repairs_prompts: bool = False
    """Whether prompts are cleaned before transformers' tokenizer, which does not, reads them.

    OpenAI's and open_clip's own tokenizers do it (curly quotes, HTML entities, ligatures).
    """

    @property
    def dtype(self) -> Dtype:
        """The number format of its networks."""
        assert self.spec.dtype is not None, "settle_dtypes comes first"
        return self.spec.dtype

    @property
    def backbone_key(self) -> tuple[str, ...]:
        """Metrics with equal keys share a backbone: family, weights, number format, tokenizer."""
        assert self.weights is not None
        weights = str(self.weights.tensors.resolve())
        reading = "repaired" if self.repairs_prompts else "as typed"
        spec = self.spec
        return self.family.value, weights, self.dtype.value, spec.tokenizer, reading

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel, for pixels in [0, 1]."""
        described = self.weights.config.get("preprocess", {}) if self.weights else {}
        return (
            described.get("image_mean") or described.get("mean") or CLIP_MEAN,
            described.get("image_std") or described.get("std") or CLIP_STD,
        )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared, in words for the manifest."""
        if self.transform.mode is ResizeMode.NONE:
            return {"resize": self.transform.mode.value}
        mean, std = self.normalisation
        return {
            "resize": self.transform.mode.value,
            "side": self.transform.side,
            "antialias": self.transform.antialias,
            "mean": list(mean),
            "std": list(std),
        }

    def settings(self, fingerprint: Callable[[Path], str] = sha256_of) -> dict[str, Any]:
        """Everything that decides the scores, as JSON; equal settings give equal scores."""
        settings: dict[str, Any] = {"kind": self.spec.kind, "preprocessing": self.preprocessing}
        settings |= self._weights_settings(fingerprint)
        settings |= {name: fingerprint(path) for name, path in self.files.items()}
        settings |= self.choices
        if self.spec.options:
            settings["options"] = dict(self.spec.options)
        if self.weights or self.files:
            settings["dtype"] = self.dtype.value
        return settings

    def _weights_settings(self, fingerprint: Callable[[Path], str]) -> dict[str, Any]:
        """The commit of weights from the hub, the hashes of local ones."""
        spec, weights = self.spec, self.weights
        if weights is None:
            return {}
        if weights.where == user_path(spec.weights):
            return {"weights": {path.name: fingerprint(path) for path in weights.files}}
        hub: dict[str, Any] = {"weights": {"hub": spec.weights, "revision": spec.revision}}
        if spec.tokenizer:  # from another place, which the hub's commit says nothing about
            hub["tokenizer"] = {path.name: fingerprint(path) for path in weights.words}
        return hub

    def check_sha256(self, fingerprint: Callable[[Path], str] = sha256_of) -> None:
        """Refuse weights other than the pinned ones.

        Raises:
            WeightsError: The head (or, without one, the weights file) has another SHA-256 than
                `sha256` pins.
        """
        pinned = self.files.get("head") or (self.weights.tensors if self.weights else None)
        if not self.spec.sha256 or pinned is None:
            return
        if (actual := fingerprint(pinned)) != self.spec.sha256:
            raise WeightsError(
                f"metrics.{self.name}: {pinned} has sha256 {actual}, pinned is {self.spec.sha256}; "
                "fetch the file again or change the pinned value"
            )


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """A kind of metric. The module of a kind has one, named METRIC."""

    resolve: Callable[[str, MetricSpec], ResolvedMetric]
    """Name and settings -> its files, its image transform, its own choices. Imports no torch and
    loads no weight; raises a `WeightsError` that names what is missing."""
    load: Callable[[ResolvedMetric, Any], Any]
    """What `resolve` returned and a `label.metrics.backbones.MetricLoader` -> an `EmbeddingMetric`
    or a `CrossMetric` (`label.metrics.protocols`). Imports torch and loads weights."""
    can_vote: bool = True
    """False for a judge that knows the truth."""
    unreadable: Callable[[str], str] = lambda _: ""
    """Why a metric of this kind cannot judge by a prompt; empty where it can, as most can always.
    Asked for every prompt before any image is generated; loads no weight."""
