"""What a simulated judge cares about: labels of the pair files, biases of the scorers."""

from dataclasses import dataclass

import numpy as np

from data.miniature import scenes
from data.miniature.scenes import Look, SceneImage


@dataclass(frozen=True, kw_only=True, slots=True)
class Taste:
    """How much a judge minds each kind of error; 0 is blind to it."""

    size: float = 0.0
    colour: float = 0.0
    shape: float = 0.0
    place: float = 0.0
    background: float = 0.0
    saturation: float = 0.0
    contrast: float = 0.0
    sharpness: float = 0.0
    doubt: float = 1.0
    """Spread of the judge's errors (logistic), in the units of the weights."""

    def pleasure(self, image: SceneImage, prompt: str) -> float:
        """How much this judge likes the image for the prompt; only differences mean anything."""
        wanted = scenes.parse(prompt)
        right = {
            name: getattr(image.scene, name) == getattr(wanted, name) for name in scenes.ATTRIBUTES
        }
        fidelity = sum(getattr(self, name) * shown for name, shown in right.items())
        return float(fidelity + self._looks(image.look))

    def _looks(self, look: Look) -> float:
        sharp = 1 - min(look.blur / 2.5, 1)
        return (
            self.saturation * look.saturation
            + self.contrast * look.contrast
            + self.sharpness * sharp
        )

    def prefers_first(self, gap: float, rng: np.random.Generator) -> bool:
        """A choice between two images whose pleasures differ by `gap`; wrong now and then."""
        return bool(gap + rng.logistic(0, self.doubt) > 0)


HUMAN = Taste(
    size=1.0, colour=1.6, shape=1.6, place=1.0, background=1.2,
    saturation=1.6, contrast=1.2, sharpness=1.2, doubt=0.35,
)  # fmt: skip
"""The annotators of the pair files: correctness first, looks too, and some noise."""
PICKSCORE = Taste(colour=1.8, shape=1.2, place=0.6, saturation=1.6, contrast=0.4, doubt=0.2)
"""Likes the right, vivid colours; blind to backgrounds and sizes."""
HPS = Taste(size=1.3, shape=1.6, place=0.6, contrast=1.5, sharpness=3.0, doubt=0.2)
"""Likes the right, sharp outlines; blind to colours."""
HELD_OUT = Taste(
    size=0.8, colour=1.0, shape=0.8, place=1.6, background=1.8,
    saturation=0.4, contrast=0.8, sharpness=0.8, doubt=0.2,
)  # fmt: skip
"""Minds everything, places and backgrounds most, which no voter does; never votes."""
