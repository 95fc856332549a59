"""One process's part in the scoring: its device, its decoders, and the shards that it scores."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
from rich.console import Console

from data.artifacts.latents import KIND as LATENTS
from data.distributed import num_workers
from data.pairs.schema import PairSource
from label.config import LabelSpec, MetricSpec
from label.scoring.batching import Batch, batch_for
from label.scoring.decode_pool import MOST_DECODERS, DecodePool
from label.scoring.panel import Panel
from label.scoring.progress import PairCount
from label.scoring.score_sets import ScoreSets, ShardTask
from label.scoring.scoring_pass import Clock
from label.scoring.shard_scorer import ScoringTools, chunk_images, score_shards
from label.scoring.vae_encoder import VaeEncoder

PARTS = ("load", "read", "decode", "embed", "latents", "score", "write")
"""What the main thread spent its time on; `read` and `decode` are waiting for prefetched work."""


@dataclass(slots=True)
class ScoringRunner:
    """Scores shards, and says how long each part of it took."""

    pairs: PairSource
    sets: ScoreSets
    count: PairCount
    specs: Mapping[str, MetricSpec]
    spec: LabelSpec
    device: torch.device
    make_encoder: Callable[[], VaeEncoder] | None = None
    """Loads what makes latents, where they are wanted."""
    clock: Clock = field(default_factory=Clock)
    num_pairs: int = 0
    batch: Batch = field(init=False)
    _planned: int = field(init=False)
    """The batch before any was halved."""

    def __post_init__(self) -> None:
        self.batch = batch_for(chunk_images(self.sets.shards), self.spec.batch)
        self._planned = self.batch.size
        if self.spec.compile:
            check_compiler(self.device)

    def run(self, tasks: Iterator[ShardTask]) -> None:
        """Score shard by shard; load the metrics when there is a first one."""
        first = next(tasks, None)
        if first is None:
            return
        with self.clock.measure("load"):
            panel = self._load()
            encoder = None
            if self.make_encoder and LATENTS in self._absent():
                encoder = self.make_encoder()
                encoder.batch = batch_for(chunk_images(self.sets.shards), encoder.batch.size)
        with DecodePool(num_workers(self.spec.workers, most=MOST_DECODERS)) as decoder:
            cache_bytes = self.spec.cache_mb * 2**20
            tools = ScoringTools(
                self.pairs, panel, self.sets, decoder, self.batch, self.clock, cache_bytes,
                encoder, self.count.advance,
            )  # fmt: skip
            self.num_pairs += score_shards(chain([first], tasks), tools)

    def say(self, console: Console) -> None:
        """Print what this process did, and how long each part of it took."""
        parts = " · ".join(f"{part} {self.clock.seconds.get(part, 0):.1f} s" for part in PARTS)
        line = f"{self.num_pairs} pairs on {self.device}: {parts}"
        if self.batch.size < self._planned:
            line += f" · label.batch={self.batch.size}, because memory ran out"
        console.print(line, highlight=False, soft_wrap=True)

    def _load(self) -> Panel:
        """The metrics that any unfinished shard lacks."""
        names = self._absent()
        specs = {name: self.specs[name] for name in self.sets.metrics if name in names}
        return Panel.load(specs, self.device, compiled=self.spec.compile)

    def _absent(self) -> set[str]:
        return {name for shard in self.sets.unfinished() for name in self.sets.absent(shard)}


def check_compiler(device: torch.device) -> None:
    """Refuse `label.compile` now where torch would miss its compiler in the middle of the run.

    Raises:
        ValueError: There is no C++ compiler (CPU) or no Triton (GPU).
    """
    if device.type == "cuda":
        available, what = importlib.util.find_spec("triton") is not None, "the package triton"
    else:
        compiler = os.environ.get("CXX", "g++")
        available = shutil.which(compiler) is not None
        what = f"a C++ compiler, and {compiler} is none"
    if not available:
        raise ValueError(
            f"label.compile=true needs {what} for {device}; install it, or set label.compile=false"
        )
