"""Which files of encoded prompts a run needs, and which it has; no torch.

Prompts are known when every pair has been read, so they are encoded after the scoring pass. Ranks
share the files as they share the pair shards, see `score_sets`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.artifacts.atomic import remove_partials
from data.artifacts.config_diff import Settings, refuse_other_settings
from data.artifacts.manifest import Manifest, describe, part_name, read_manifest, write_manifest
from data.artifacts.parquet_io import read_settings, read_table, write_table
from data.artifacts.schemas import TEXT_PROMPTS, Status
from data.artifacts.texts import KIND, PART_PROMPTS, PROMPTS, TextFormat, listing_identity
from data.families.text import ModelText
from label.scoring.score_sets import FACTS, ScoreSets, refuse_changed

PAIRS = "pairs"
"""In the manifest's provenance: the number of pairs whose prompts were gathered."""


@dataclass(frozen=True)
class TextFiles:
    """The files of encoded prompts of a run."""

    folder: Path
    form: TextFormat
    model: Path
    """The model's diffusers folder."""
    text: ModelText
    num_pairs: int
    gather: Callable[[], Iterable[str]]
    """Gives the pairs' prompts, when all pairs are scored."""

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The empty prompt, then those of the pairs, each once, in their order."""
        return tuple(dict.fromkeys(["", *self.gather()]))

    @property
    def num_files(self) -> int:
        """Files of the set, apart from the list of prompts."""
        return -(-len(self.prompts) // PART_PROMPTS)

    def prompts_of(self, index: int) -> tuple[str, ...]:
        """The prompts of a file."""
        return self.prompts[index * PART_PROMPTS : (index + 1) * PART_PROMPTS]

    def path(self, index: int) -> Path:
        """Where a file lies."""
        return self.folder / part_name(index)

    def settings(self, index: int) -> dict[str, Any]:
        """What decides a file."""
        return self.form.settings | {"prompts": listing_identity(self.prompts_of(index))}

    def absent(self) -> list[int]:
        """The files that are still to be written.

        Raises:
            ShardError: One that is there is torn, of another format, or of other prompts.
        """
        absent = [index for index in range(self.num_files) if not self.path(index).exists()]
        for index in set(range(self.num_files)).difference(absent):
            path = self.path(index)
            _refuse_others(path, read_settings(path), self.settings(index))
        return absent

    def is_complete(self) -> bool:
        """Whether the set is complete.

        Raises:
            ShardError: There is a complete set of another format.
        """
        manifest = read_manifest(self.folder, KIND)
        if manifest is None:
            return False
        _refuse_others(self.folder, manifest.settings, self.form.settings)
        return manifest.provenance.get(PAIRS) == self.num_pairs

    def declare_complete(self, provenance: Mapping[str, Any], since: float) -> None:
        """Write the list of prompts and the manifest, once all files are there.

        Raises:
            ShardError: A file is torn, or was changed after it was declared complete.
        """
        remove_partials(self.folder, since)
        listing = pa.table({"prompt": self.prompts}, schema=TEXT_PROMPTS)
        write_table(self.folder / PROMPTS, listing, self.form.settings)
        paths = [self.path(index) for index in range(self.num_files)]
        files = [describe(path) for path in (self.folder / PROMPTS, *paths)]
        known = read_manifest(self.folder, KIND)
        if known is not None:
            refuse_changed(self.folder, known.files, files, since)
        settings = read_settings(paths[0])
        settings.pop("prompts")
        facts = dict(provenance) | {PAIRS: self.num_pairs}
        write_manifest(
            self.folder, Manifest(kind=KIND, settings=settings, files=files, provenance=facts)
        )


def scored_prompts(sets: ScoreSets) -> Iterator[str]:
    """The prompts of all pairs that could be scored, from the facts of the scoring pass."""
    for shard in sets.shards:
        facts = read_table(sets.path(FACTS, shard), ["prompt", "status"]).to_pydict()
        for prompt, status in zip(facts["prompt"], facts["status"], strict=True):
            if status == Status.OK:
                yield prompt


def _refuse_others(path: Path, before: Settings, now: Settings) -> None:
    """Compare what decides a file, not the shape of its rows, which follows from that."""
    refuse_other_settings(path, {name: before.get(name) for name in now}, now)
