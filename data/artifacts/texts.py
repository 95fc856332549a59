"""Encoded prompts of a pair set on disk: their identity, and what is in their files.

A set `texts/<family>-<encoders>/` has each distinct prompt of the pairs that could be scored once,
in their order, after the empty prompt. `prompts.parquet` lists them, and each of
`part-00000.parquet`, ... has the next `PART_PROMPTS` of them. A row's bytes are what the family's
`encode` returns: the states, (token, width), and the pooled form where the family has one, in
little-endian order. Where the family tells tokens from padding, `length` is their number.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.atomic import ShardError
from data.artifacts.config_diff import Settings
from data.artifacts.latents import BYTES_OF
from data.artifacts.manifest import Manifest, read_manifest

KIND = "texts"
PROMPTS = "prompts.parquet"
"""The list of prompts."""
PART_PROMPTS = 512
"""Prompts of a file: 2 GiB of FLUX.1's, and some seconds of a GPU."""
COMPRESSION = "lz4"
"""It takes the zeros with which some families fill their states up, and costs no time elsewhere."""
AGAIN = "delete {folder} and run `make labels` again, or set train.texts=never"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFormat:
    """Everything apart from the prompts that decides the bytes of a set."""

    family: str
    encoders: str
    """SHA-256 over the text encoders, the tokenizers, and what else decides the states."""
    dtype: str
    """Format on disk: fp16, bf16 or fp32."""
    compute: str
    """Format in which the text encoders ran."""

    @property
    def name(self) -> str:
        """The set's folder below `texts/`."""
        return set_name(self.family, self.encoders)

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON, for footers and the manifest; equal settings and prompts give equal bytes."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {"kind": KIND, **values}


def set_name(family: str, encoders: str) -> str:
    """The folder of the texts of a family's encoders, given by their SHA-256."""
    return f"{family}-{encoders[:12]}"


def listing_identity(prompts: Sequence[str]) -> str:
    """Names a list of prompts: a SHA-256."""
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """The numbers of a prompt."""

    states: tuple[int, int]
    """Tokens and width."""
    pooled: int = 0
    """Width of the pooled form; 0 where the family has none."""
    length: bool = False
    """Whether each prompt has its number of tokens."""

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON, for the manifest."""
        shape = {"states": list(self.states), "pooled": self.pooled}
        return shape | ({"length": True} if self.length else {})

    def num_bytes(self, dtype: str) -> tuple[int, int]:
        """Bytes of a prompt's states and of its pooled form."""
        tokens, width = self.states
        return tokens * width * BYTES_OF[dtype], self.pooled * BYTES_OF[dtype]


@dataclass(frozen=True, slots=True)
class TextSet:
    """A complete set."""

    folder: Path
    manifest: Manifest
    form: TextFormat
    shape: TextShape

    def __str__(self) -> str:
        """The format in words: `512x4096 + 768 bf16, 4098 KiB a prompt`."""
        states = "x".join(map(str, self.shape.states))
        pooled = f" + {self.shape.pooled}" if self.shape.pooled else ""
        each = sum(self.shape.num_bytes(self.form.dtype)) / 1024
        return f"{states}{pooled} {self.form.dtype}, {each:.0f} KiB a prompt"


def read_set(folder: Path) -> TextSet | None:
    """The set in a folder, or None when it is not (yet) complete.

    Raises:
        ShardError: The manifest is damaged, of another kind, or contradicts itself.
    """
    manifest = read_manifest(folder, KIND)
    if manifest is None:
        return None
    try:
        form, shape = _described(manifest.settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"{folder} has texts that cannot be used: their settings lack or contradict {error}; "
            f"{AGAIN.format(folder=folder)}"
        ) from error
    if form.name != folder.name:
        raise ShardError(f"{folder} has the manifest of {form.name}; delete the folder")
    return TextSet(folder, manifest, form, shape)


def _described(settings: Settings) -> tuple[TextFormat, TextShape]:
    """The format and the shape that a manifest speaks of."""
    values = {name: settings[name] for name in TextFormat.__slots__}
    tokens, width = settings["states"]
    numbers = (tokens, width, settings["pooled"])
    if not all(type(number) is int and number >= 0 for number in numbers) or not tokens * width:
        raise ValueError(f"states={settings['states']}, pooled={settings['pooled']}")
    if values["dtype"] not in BYTES_OF or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"dtype={values['dtype']}")
    shape = TextShape(
        states=(tokens, width), pooled=settings["pooled"], length=settings.get("length") is True
    )
    return TextFormat(**values), shape
