"""Settings of prompt sets and of the sampler."""

from dataclasses import dataclass
from enum import Enum


class PromptsKind(Enum):
    """Where prompts come from, and in which layout."""

    miniature = "miniature"
    """Held-out prompts of the embedded world (`split`: test or validation)."""
    lines = "lines"
    """A text file, one prompt a line."""
    parti = "parti"
    """PartiPrompts.tsv: columns Prompt, Category, Challenge; quotes are ordinary characters."""
    hpd = "hpd"
    """HPDv2's benchmark: a JSON list of prompts, or a folder of such lists, one for each style."""
    table = "table"
    """A Parquet, TSV or CSV file, a JSON list or JSON lines, with a column of prompts and optional
    columns `category` and `challenge`; or a folder of Parquet files (`split`)."""
    pairs = "pairs"
    """The prompts of the run's own pair set, from files of another `split` than it trains on."""


class Scheduler(Enum):
    """The scheduler that images are sampled with."""

    ddim = "ddim"
    """Deterministic DDIM (eta 0) on the model's own noise schedule; for flow-matching models, for
    which that step is Euler's, the scheduler in the model's folder."""
    own = "own"
    """The scheduler in the model's folder, configured as it is there."""


@dataclass(kw_only=True, slots=True)
class PromptsSpec:
    """A set of prompts to sample images for."""

    name: str = "???"
    """Its name in tables and reports."""
    kind: PromptsKind = PromptsKind.lines
    """Its source."""
    path: str = ""
    """The file, where the kind has one; or owner/name/file of a hub data set."""
    revision: str | None = None
    """The hub's 40-digit commit; never a branch."""
    split: str = "test"
    """The part of the source, where it has parts; of files the whole name, as in `pairs.split`."""
    column: str = ""
    """The table's column of prompts; empty takes `prompt` or `caption`, whichever exists."""
    max_prompts: int = 0
    """Take at most this many, starting with the first; 0 takes all."""
    exclude_trained: bool = False
    """Leave out prompts that occur in a training pair; case and whitespace are ignored."""
