"""A model's text encoders as stage one needs them to write texts, known without loading them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.artifacts.atomic import sha256_of
from data.artifacts.readable import UnreadableError, check_readable, read_json_object
from data.families import INDEX, families, family_of
from data.models.family import NO_PART, Family, ModelConfig, ModelError
from data.models.safetensors_header import index_files

TEXT_ON_HUB = tuple(
    dict.fromkeys(
        [
            *(f"{part}/{name}" for one in families() for part in one.text_encoders
              for name in ("config.json", "model*.safetensors", "model.safetensors.index.json")),
            *(f"{part}/*" for one in families() for part in one.parts if "tokenizer" in part),
            *(f"{one.denoiser}/config.json" for one in families()),
            INDEX,
        ]
    )
)  # fmt: skip
"""What is fetched of a model's repository."""
TEXT_PARTS = ("text_encoder", "tokenizer")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelText:
    """How a model encodes text, known without loading it."""

    family: Family
    config: ModelConfig
    """Without the VAE's and the scheduler's part."""
    sha256: str
    """Over all that decides an encoded prompt: encoders, tokenizers, lengths."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The text encoders and tokenizers that the model has."""
        return _text_parts(self.family, self.config)


def find_text(model: Path, fingerprint: Callable[[Path], str] = sha256_of) -> ModelText:
    """How the model of a diffusers folder encodes text.

    Raises:
        ValueError: It is of no family, or a file of it is missing; begins with the setting.
    """
    what = f"model.path={model}"
    index = read_json_object(model / INDEX, what)
    family = family_of(what, index)
    denoiser = read_json_object(model / family.denoiser / "config.json", what)
    config = ModelConfig(index=index, denoiser=denoiser, vae={}, scheduler={})
    parts = _text_parts(family, config)
    for part in parts:
        entry = index.get(part) or NO_PART
        if str(entry[-1]).removesuffix("Fast") != family.parts[part]:
            raise ModelError(
                f"{what}: {INDEX} has {part}={entry}; a {family.pipeline} has a "
                f"{family.parts[part]} there"
            )
    facts = {
        "family": family.name,
        "classes": {part: index.get(part) for part in parts},
        "settings": family.text_settings(config),
        "files": {
            path.relative_to(model).as_posix(): fingerprint(path)
            for part in parts
            for path in _files(model / part, what)
        },
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return ModelText(family, config, digest)


def _text_parts(family: Family, config: ModelConfig) -> tuple[str, ...]:
    parts = family.parts_in(config.index)
    return tuple(part for part in parts if part.startswith(TEXT_PARTS))


def _files(part: Path, what: str) -> list[Path]:
    """The files of a text encoder or a tokenizer, in a fixed order."""
    if not part.is_dir():
        raise UnreadableError(f"{what} has no folder {part.name!r}, which encodes its prompts")
    if part.name.startswith("tokenizer"):
        return sorted(path for path in part.iterdir() if path.is_file() and path.name[0] != ".")
    single, several = part / WEIGHTS, part / f"{WEIGHTS}.index.json"
    weights = [single] if single.exists() else index_files(several)
    for path in (part / "config.json", *weights):
        check_readable(path, what)
    return [part / "config.json", *weights]
