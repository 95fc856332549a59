"""What decides a metric's scores, known without loading it: files, preprocessing, number format.

Nothing here imports torch, so that a run with nothing left to do answers at once, and so that
missing weights are reported before any are loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.atomic import sha256_of
from label.config import MetricKind, MetricSpec
from label.metrics.fingerprints import Fingerprints
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.weights import (
    HF_ON_HUB,
    OPEN_CLIP_ON_HUB,
    WORDS_ON_HUB,
    Weights,
    WeightsError,
    blip_weights,
    check_tokenizer,
    hf_weights,
    locate,
    mps_weights,
    open_clip_weights,
    qwen_weights,
    side_of,
    tokenizer_files,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's normalisation, which all published scorers of the family keep."""

HPS_V3_SIDE = 448
"""HPSv3 reads images of about 448 x 448 pixels: 256 tokens of 28 x 28."""

VOCABULARY = "vocab.json"
"""What CLIP's and Qwen's tokenizers have where they have no tokenizer.json."""

ON_BLIP = (MetricKind.image_reward, MetricKind.cycle_reward)
"""Cross-encoders on BLIP; their tokenizer is BERT's and lies in a folder of its own."""

CUT_BY_HUGGING_FACE = (MetricKind.pickscore, MetricKind.mps)
"""Metrics whose official code prepares images with CLIPImageProcessor; the others' has OpenAI's
transform, which may begin the middle one pixel further."""


@dataclass(frozen=True, slots=True)
class ResolvedMetric:
    """A metric before it is loaded."""

    name: str
    spec: MetricSpec
    view: ImageTransform
    weights: Weights | None = None
    head: Path | None = None
    template: Path | None = None

    @property
    def tower(self) -> tuple[str, ...]:
        """Metrics with equal towers share one: family, weights, number format, way to read."""
        assert self.weights is not None
        family = "open_clip" if self.spec.kind is MetricKind.hps else "hf_clip"
        weights = str(self.weights.tensors.resolve())
        reading = "repaired" if self.repairs_prompts else "as typed"
        return family, weights, self.spec.dtype.value, self.spec.tokenizer, reading

    @property
    def repairs_prompts(self) -> bool:
        """Whether prompts are cleaned before transformers' tokenizer, which does not, reads them.

        OpenAI's and open_clip's own tokenizers do it (curly quotes, HTML entities, ligatures), so
        it belongs to CLIP score; the aesthetic head reads no prompt and may share the tower.
        """
        return self.spec.kind in (MetricKind.clip, MetricKind.aesthetic)

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel, for pixels in [0, 1]."""
        found = self.weights.config.get("preprocess", {}) if self.weights else {}
        return (
            found.get("image_mean") or found.get("mean") or CLIP_MEAN,
            found.get("image_std") or found.get("std") or CLIP_STD,
        )

    def settings(self, fingerprint: Callable[[Path], str] = sha256_of) -> dict[str, Any]:
        """Everything that decides the scores, as JSON; equal settings give equal scores."""
        spec = self.spec
        found: dict[str, Any] = {"kind": spec.kind.value, "preprocessing": self.preprocessing}
        if self.weights is None:
            return found
        if self.weights.where != Path(spec.weights).expanduser():
            found["weights"] = {"hub": spec.weights, "revision": spec.revision}
            if spec.tokenizer:  # from another place, which the hub's commit says nothing about
                found["tokenizer"] = {path.name: fingerprint(path) for path in self.weights.words}
        else:
            found["weights"] = {path.name: fingerprint(path) for path in self.weights.files}
        for part, path in (("head", self.head), ("template", self.template)):
            if path is not None:
                found[part] = fingerprint(path)
        return found | self._own_choices() | {"dtype": spec.dtype.value}

    def _own_choices(self) -> dict[str, Any]:
        """What only this kind of metric can choose."""
        spec = self.spec
        if spec.kind is MetricKind.mps:
            return {"condition": spec.condition, "threshold": spec.threshold}
        if spec.kind is MetricKind.clip:
            return {"prompts": "repaired by ftfy, HTML entities resolved"}
        bare = self.weights is not None and self.weights.tensors == self.weights.where
        return {"arch": spec.arch} if bare and spec.kind is MetricKind.hps else {}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are made ready, in words for the manifest."""
        if self.view.fit is ResizeMode.NONE:
            return {"resize": self.view.fit.value}
        mean, std = self.normalisation
        return {
            "resize": self.view.fit.value,
            "side": self.view.side,
            "antialias": self.view.antialias,
            "mean": list(mean),
            "std": list(std),
        }

    def check_sha256(self, fingerprint: Callable[[Path], str] = sha256_of) -> None:
        """Refuse weights other than the pinned ones.

        Raises:
            WeightsError: The file has another SHA-256 than `sha256` asks for.
        """
        pinned = self.head or (self.weights.tensors if self.weights else None)
        if not self.spec.sha256 or pinned is None:
            return
        if (found := fingerprint(pinned)) != self.spec.sha256:
            raise WeightsError(
                f"metrics.{self.name}: {pinned} has sha256 {found}, pinned is {self.spec.sha256}; "
                "fetch the file again or change the pinned value"
            )


def score_settings(
    specs: Mapping[str, MetricSpec], memory: Path | None = None
) -> dict[str, dict[str, Any]]:
    """What decides each metric's scores, for both stages; loads no weights.

    Hashes of weights are remembered in the file `memory`, since a panel has gigabytes of them.

    Raises:
        WeightsError: Something is missing, of another kind, or not what is pinned.
    """
    fingerprints = Fingerprints(memory)
    identities = [resolve(name, spec) for name, spec in specs.items()]
    for identity in identities:
        identity.check_sha256(fingerprints)
    return {identity.name: identity.settings(fingerprints) for identity in identities}


def resolve(name: str, spec: MetricSpec) -> ResolvedMetric:
    """Find a metric's files and preprocessing; loads no weights.

    Raises:
        WeightsError: Something is missing or of another kind; names it and the setting.
    """
    if spec.kind is MetricKind.oracle:
        return ResolvedMetric(name, spec, ImageTransform(ResizeMode.NONE))
    wanted = OPEN_CLIP_ON_HUB if spec.kind is MetricKind.hps else HF_ON_HUB
    where = locate(f"metrics.{name}.weights", spec.weights, spec.revision, wanted)
    if spec.kind is MetricKind.hps:
        weights = open_clip_weights(name, where, spec.arch)
        side = side_of(weights.config["model_cfg"]["vision_cfg"].get("image_size", 224))
        return ResolvedMetric(
            name, spec, ImageTransform(ResizeMode.PAD, side, spec.antialias), weights
        )
    if spec.kind is MetricKind.hps_v3:
        weights = qwen_weights(name, where, _words(name, spec) or ())
        template = locate(f"metrics.{name}.template", spec.template, None)
        return ResolvedMetric(
            name, spec, ImageTransform(ResizeMode.AREA, HPS_V3_SIDE), weights, template=template
        )
    weights = _on_transformers(name, spec, where)
    fit = ResizeMode.CROP if spec.kind in CUT_BY_HUGGING_FACE else ResizeMode.CROP_EVEN
    view = ImageTransform(fit, side_of(weights.config["vision_config"].get("image_size", 224)))
    head = None
    if spec.kind is MetricKind.aesthetic:
        head = locate(f"metrics.{name}.head", spec.head, None)
    return ResolvedMetric(name, spec, view, weights, head)


def _on_transformers(name: str, spec: MetricSpec, where: Path) -> Weights:
    """The files of a metric on transformers' CLIP or BLIP."""
    words = _words(name, spec)
    if spec.kind in ON_BLIP:
        return blip_weights(name, where, words or ())
    weights = (mps_weights if spec.kind is MetricKind.mps else hf_weights)(name, where, words)
    if spec.kind is not MetricKind.aesthetic:
        check_tokenizer(name, where, weights.words, VOCABULARY)
    return weights


def _words(name: str, spec: MetricSpec) -> tuple[Path, ...] | None:
    """The files of a tokenizer that does not lie beside the weights; None where it does."""
    if not spec.tokenizer and spec.kind not in (*ON_BLIP, MetricKind.hps_v3):
        return None
    setting = f"metrics.{name}.tokenizer"
    where = locate(setting, spec.tokenizer, spec.tokenizer_revision, WORDS_ON_HUB)
    words = tokenizer_files(where)
    check_tokenizer(name, where, words, "vocab.txt" if spec.kind in ON_BLIP else VOCABULARY)
    return words
