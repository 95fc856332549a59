"""What was computed of each distinct image and prompt, as long as there is room.

Rows refer to their image and prompt, so nothing that is still needed is evicted; of the others, the
least recently used go first.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np

from label.metrics.preprocessing import Cut, ProcessedImage, Transform

OVERHEAD = 1280
"""Bytes in memory besides the embeddings; measured for an image with three (a prompt has 930)."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class CachedImage:
    """A distinct image and what was computed of it."""

    processed: ProcessedImage | None = None
    """Status, reason and size, without the arrays; None while it is being decoded."""
    embeddings: dict[tuple[int, Transform], np.ndarray] = field(default_factory=dict)
    """By backbone and transform, fp32 of length 1, and latents as bytes; empty for an image that
    cannot be read."""
    cuts: frozenset[Cut] = frozenset()
    """Those whose latents are computed, or are about to be."""
    judged: dict[str, dict[str, np.float32]] = field(default_factory=dict)
    """Prompt -> metric -> score, of metrics that see both together."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class CachedPrompt:
    """A distinct prompt and what was computed of it."""

    text: str
    embeddings: dict[int, np.ndarray] = field(default_factory=dict)
    """By backbone, fp32 of length 1."""


class EmbeddingCache:
    """Images by their `image_key` and prompts by their text."""

    def __init__(self, limit: int, image_bytes: int, prompt_bytes: int) -> None:
        """`limit` bytes are kept beyond what rows hold; the others are the sizes of an entry."""
        self._room, self._cost = limit, {CachedImage: image_bytes, CachedPrompt: prompt_bytes}
        self._images: WeakValueDictionary[bytes, CachedImage] = WeakValueDictionary()
        self._prompts: WeakValueDictionary[str, CachedPrompt] = WeakValueDictionary()
        self._kept: OrderedDict[bytes | str, CachedImage | CachedPrompt] = OrderedDict()

    def image(self, key: bytes) -> tuple[CachedImage, bool]:
        """The image of this key, and whether it is new."""
        known = self._images.get(key)
        image = known or CachedImage()
        self._images[key] = image
        self._keep(key, image)
        return image, known is None

    def prompt(self, text: str) -> tuple[CachedPrompt, bool]:
        """The prompt, and whether it is new."""
        known = self._prompts.get(text)
        prompt = known or CachedPrompt(text)
        self._prompts[text] = prompt
        self._keep(text, prompt)
        return prompt, known is None

    def forget(self) -> None:
        """Forget everything; rows keep what they have."""
        self._images.clear()
        self._prompts.clear()
        while self._kept:
            self._drop_oldest()

    def _keep(self, key: bytes | str, entry: CachedImage | CachedPrompt) -> None:
        if key not in self._kept:
            self._room -= self._cost[type(entry)]
        self._kept[key] = entry
        self._kept.move_to_end(key)
        while self._room < 0:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, entry = self._kept.popitem(last=False)
        self._room += self._cost[type(entry)]
