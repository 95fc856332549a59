"""What is known of each distinct picture and prompt, for as long as there is room.

Rows hold on to their picture and prompt, so nothing that is still needed is ever forgotten; beyond
that, the longest unused go first.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np

from label.metrics.preprocessing import Prepared, View

OVERHEAD = 1280
"""Bytes in memory besides the embeddings; measured for a picture with three (a prompt has 930)."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Picture:
    """A distinct picture and what was computed of it."""

    found: Prepared | None = None
    """Status, reason and size, without the arrays; None while it is being decoded."""
    embeddings: dict[tuple[int, View], np.ndarray] = field(default_factory=dict)
    """By tower and view, fp32 of length 1, and latents as bytes; empty for a picture that cannot be
    read."""
    judged: dict[str, dict[str, np.float32]] = field(default_factory=dict)
    """Prompt -> metric -> score, for metrics that see both together."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Prompt:
    """A distinct prompt and what was computed of it."""

    text: str
    embeddings: dict[int, np.ndarray] = field(default_factory=dict)
    """By tower, fp32 of length 1."""


class Memory:
    """Pictures by their `image_key` and prompts by their text."""

    def __init__(self, limit: int, picture_bytes: int, prompt_bytes: int) -> None:
        """`limit` bytes are kept beyond what rows hold; the others are the sizes of an entry."""
        self._room, self._cost = limit, {Picture: picture_bytes, Prompt: prompt_bytes}
        self._pictures: WeakValueDictionary[bytes, Picture] = WeakValueDictionary()
        self._prompts: WeakValueDictionary[str, Prompt] = WeakValueDictionary()
        self._kept: OrderedDict[bytes | str, Picture | Prompt] = OrderedDict()

    def picture(self, key: bytes) -> tuple[Picture, bool]:
        """The picture of this key, and whether it is new."""
        known = self._pictures.get(key)
        picture = known or Picture()
        self._pictures[key] = picture
        self._keep(key, picture)
        return picture, known is None

    def prompt(self, text: str) -> tuple[Prompt, bool]:
        """The prompt, and whether it is new."""
        known = self._prompts.get(text)
        prompt = known or Prompt(text)
        self._prompts[text] = prompt
        self._keep(text, prompt)
        return prompt, known is None

    def forget(self) -> None:
        """Know nothing any more; rows keep what they have."""
        self._pictures.clear()
        self._prompts.clear()
        while self._kept:
            self._drop_oldest()

    def _keep(self, key: bytes | str, entry: Picture | Prompt) -> None:
        if key not in self._kept:
            self._room -= self._cost[type(entry)]
        self._kept[key] = entry
        self._kept.move_to_end(key)
        while self._room < 0:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, entry = self._kept.popitem(last=False)
        self._room += self._cost[type(entry)]
