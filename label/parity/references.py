"""Published scores of published images, which a metric with the official weights must reproduce."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.artifacts.atomic import sha256_of
from label.config import MetricSpec


@dataclass(frozen=True, slots=True)
class ReferenceImage:
    """A file that somebody published."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Reference:
    """Scores that an official code gave."""

    source: str
    """Where the images and the numbers were published."""
    kind: str
    weights: str
    """A regular expression that the name of the weights matches."""
    images: tuple[ReferenceImage, ...]
    prompts: tuple[str, ...]
    """One for each image; or several for the only image."""
    expected: tuple[float, ...]
    tolerance: float
    """Allowed difference: other hardware and number formats, and the digits printed."""
    scale: float = 0.0
    """Where `expected` are chances, a softmax of scale x score; 0 where they are scores."""

    def is_about(self, spec: MetricSpec) -> bool:
        """Whether a metric should reproduce these numbers."""
        return spec.kind == self.kind and re.search(self.weights, spec.weights) is not None

    def of(self, scores: np.ndarray) -> np.ndarray:
        """Scores as they were published."""
        if not self.scale:
            return scores
        odds = np.exp(self.scale * (scores - scores.max()))
        chances: np.ndarray = odds / odds.sum()
        return chances


REFERENCES = (
    Reference(
        "README of THUDM/ImageReward, assets/images",
        "image_reward",
        "",  # there is but one
        (
            ReferenceImage(
                "1.webp", "a5fcd126763da8b3fe2a9e620fc1ba03d215d20de36c77bf6770a540a9bc972d"
            ),
            ReferenceImage(
                "2.webp", "dc13919a49a37987d19c8be3ba0c1ef2941570f820f90fb66ac91a9a9db24082"
            ),
            ReferenceImage(
                "3.webp", "ee859bac167e6a04cbcde63454757b6fc7d9b8704429c15725ca8c4accf176e3"
            ),
            ReferenceImage(
                "4.webp", "84faf59d59d9ca7ab298c9acb957d727365ae104768ac1a1ec55ab96be68aaf9"
            ),
        ),
        ("a painting of an ocean with clouds and birds, day time, low depth field effect",) * 4,
        (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492),
        tolerance=0.01,
    ),
    Reference(
        "issue 27 of tgxs002/HPSv2, hpsv2/assets",
        "hps",
        r"HPS_v2_",
        (
            ReferenceImage(
                "demo_image.jpg",
                "798dfb5bc544fca70ea15d21571530c4389a25536d6a511e0b0c915b0aba144d",
            ),
        ),
        ("A cat with two horns on its head",),
        (0.2876,),
        tolerance=0.002,  # half precision, and nobody says whether resizing antialiased
    ),
    Reference(
        "README of openai/CLIP",
        "clip",
        r"clip-vit-base-patch32",
        (
            ReferenceImage(
                "CLIP.png", "308a3ca4503f1c7a07803916c369d78c4ef501e5ab7fc727da9b5e1d2f9ec85b"
            ),
        ),
        ("a diagram", "a dog", "a cat"),
        (0.9927937, 0.00421068, 0.00299572),
        tolerance=0.0005,
        scale=100.0,
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The comparison of one metric with one reference."""

    metric: str
    reference: Reference
    scores: tuple[float, ...] = ()
    missing: str = ""
    """Why nothing was compared."""

    @property
    def worst(self) -> float:
        """The largest distance; NaN where a score is."""
        return float(np.abs(np.subtract(self.scores, self.reference.expected)).max())

    @property
    def fits(self) -> bool:
        """Whether it was compared and every score is near the published one."""
        return not self.missing and self.worst <= self.reference.tolerance


Score = Callable[[str, Sequence[bytes], Sequence[str]], np.ndarray]
"""Metric, images and prompts -> scores; a ValueError says what it lacks."""


def check(metrics: Mapping[str, MetricSpec], folder: Path | None, score: Score) -> list[Finding]:
    """Compare every metric with every reference that is about it."""
    findings = []
    for reference in REFERENCES:
        for name, spec in metrics.items():
            if reference.is_about(spec):
                findings.append(_check(name, reference, folder, score))
    return findings


def _check(name: str, reference: Reference, folder: Path | None, score: Score) -> Finding:
    try:
        images = [find(image, folder) for image in reference.images]
        many = len(reference.prompts) // len(images)
        scores = score(name, [path.read_bytes() for path in images * many], reference.prompts)
    except ValueError as error:
        return Finding(name, reference, missing=str(error))
    return Finding(name, reference, tuple(reference.of(scores).tolist()))


def find(image: ReferenceImage, folder: Path | None) -> Path:
    """The image below a folder, wherever it lies there.

    Raises:
        ValueError: It is not there, or is another image of the same name.
    """
    if folder is None:
        raise ValueError(f"parity.images is not set; {image.name} should be below it")
    same_name = sorted(folder.rglob(image.name))
    for path in same_name:
        if sha256_of(path) == image.sha256:
            return path
    others = ", ".join(map(str, same_name))
    what = f"{others} is another image" if others else f"no {image.name} below {folder}"
    raise ValueError(f"{what} (parity.images={folder})")
