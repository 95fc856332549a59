"""The commands of all rounds; pure: what is run follows from the settings and a round's number.

Round r generates pairs with the policy of round r - 1 (round 1 with the base), labels them, trains
from that policy, and judges the result. Each round is a run of its own below the run's folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from data.pairs.config import PairsSpec
from evaluate.config import RoundsSpec

STAGES = ("generate", "label", "train", "evaluate")
SEEDS_APART = 1_000_000
"""How far apart the seeds of two rounds lie that generate images for the same prompts."""


def name_of(number: int) -> str:
    """The name of a round, of its folder and of its model; rounds count from 1."""
    return f"round-{number}"


@dataclass(frozen=True, slots=True)
class Command:
    """A stage with its settings, as people type them."""

    stage: str
    settings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PromptBlocks:
    """The prompts of each round: neighbouring blocks of one set, as long as there are any."""

    available: int
    """Distinct prompts of the set."""
    wanted: int = 0
    """Prompts a round; 0 means all."""
    skipped: int = 0
    """Prompts at the start of the set that no round uses."""

    @property
    def size(self) -> int:
        """Prompts of each round."""
        return min(self.wanted or self.available, self.available)

    @property
    def num_blocks(self) -> int:
        """How many rounds have prompts of their own."""
        return max(1, self.available // self.size)

    def first(self, number: int) -> int:
        """The place of a round's first prompt in the set."""
        return self.skipped + (number - 1) % self.num_blocks * self.size

    def same_as(self, number: int) -> int | None:
        """The first round that had the same prompts, where this one has none of its own."""
        return (number - 1) % self.num_blocks + 1 if number > self.num_blocks else None

    def notes(self, count: int) -> list[str]:
        """What is to be said of the prompts of so many rounds."""
        if count <= self.num_blocks:
            return []
        need = f"{count} rounds of {self.size} prompts need {count * self.size}"
        return [
            f"prompts are used again: {need}, and generate.prompts has {self.available}; from "
            f"round {self.num_blocks + 1} on they get other noise. More prompts, or a lower "
            "generate.prompts.max_prompts, give each round its own"
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsPlan:
    """All rounds of a run."""

    spec: RoundsSpec
    folder: Path
    """The run's folder; each round has one below it."""
    run: str
    settings: tuple[str, ...]
    """What was typed, for all stages of all rounds."""
    base: str
    """The model of round 1: its path, or its hub id and commit (`id@commit`)."""
    base_name: str
    prompts: PromptBlocks
    first_seed: int
    """`generate.first_seed` of round 1."""
    judged: str
    """`evaluate.folder`."""
    vote: str
    """`vote.name`."""

    def round_folder(self, number: int) -> Path:
        """The folder of a round's run."""
        return self.folder / name_of(number)

    def policy(self, number: int) -> str:
        """The model of a round; 0 is the base."""
        return str(self.round_folder(number) / "train" / "pipeline") if number else self.base

    def commands(self, number: int) -> list[Command]:
        """The stages of a round, in order; a stage that is finished answers at once."""
        own = (*self.settings, f"run={self.run}/{name_of(number)}", "goal=evaluate")
        before = number - 1
        policy = (f"model.path={self.policy(before)}", "model.revision=null") if before else ()
        mixed = _with_pairs(own, self.mixture(number))
        models = {self.base_name: self.base}
        models |= {name_of(n): self.policy(n) for n in (before, number) if n}
        compared = [f"models.{name}={path}" for name, path in models.items()]
        if before:  # which has compared all but this round's model, on the same prompts
            compared.append(f"evaluate.reuse={self.round_folder(before) / self.judged}")
        return [
            Command("generate", (*own, *policy, *self._prompts(number))),
            Command("label", (*mixed, *policy)),
            Command("train", (*mixed, *policy)),
            Command("evaluate", (*mixed, *compared)),
        ]

    def _prompts(self, number: int) -> tuple[str, ...]:
        """The settings of a round's prompts and noise."""
        words = [f"generate.prompts.skip_prompts={self.prompts.first(number)}"]
        if self.prompts.same_as(number):
            words.append(f"generate.first_seed={self.first_seed + SEEDS_APART * (number - 1)}")
        return tuple(words)

    def mixed_fraction(self, number: int) -> float:
        """The fraction of a round's pairs that is mixed in; earlier rounds give all they have."""
        if self.spec.mix_pairs.root:
            return self.spec.mix
        return min(self.spec.mix, (number - 1) / number)

    def mixture(self, number: int) -> tuple[str, ...]:
        """The settings that mix other pairs into a round's own; none where there are no others."""
        earlier = [
            PairsSpec(kind="own", root=str(self.round_folder(n) / "pairs"))
            for n in range(1, number)
        ]
        given = [self.spec.mix_pairs] if self.spec.mix_pairs.root else []
        if not (fraction := self.mixed_fraction(number)):
            return ()
        return (
            "pairs=mixture",
            f"pairs.root={self.round_folder(number) / 'pairs'}",
            "pairs.options.kind=own",
            f"pairs.options.fraction={fraction}",
            f"pairs.options.others=[{', '.join(map(_as_words, given or earlier))}]",
        )


def _with_pairs(settings: Sequence[str], mixture: Sequence[str]) -> tuple[str, ...]:
    """The settings with a mixture in place of the run's own pairs."""
    if not mixture:
        return tuple(settings)
    return (*(word for word in settings if not word.startswith("pairs=")), *mixture)


def _as_words(pairs: PairsSpec) -> str:
    """A pair set as a value of Hydra's; what is not set is left out."""
    plain = PairsSpec(root="")
    changed = {
        item.name: getattr(pairs, item.name)
        for item in fields(pairs)
        if item.name in ("kind", "root") or getattr(pairs, item.name) != getattr(plain, item.name)
    }
    return _as_value(changed)


def _as_value(value: Any) -> str:
    """Nested values as Hydra reads them: like JSON, but keys have no quotes."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_as_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_value, value))}]"
    return json.dumps(value.value if isinstance(value, Enum) else value, ensure_ascii=False)
