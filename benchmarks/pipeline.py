"""Stage one as a whole, beside bare forward passes and beside scoring pair by pair."""

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

from benchmarks import inputs
from data.devices import choose_device
from data.distributed import Rank
from data.images import decode
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairSource
from label.config import MetricSpec
from label.metrics.backbones import Backbone, HfClipBackbone
from label.metrics.protocols import EmbeddingMetric
from label.metrics.registry import score_settings
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.panel import Panel
from label.scoring.runner import PARTS
from label.scoring.score_sets import ScoreSets, plan
from label.scoring.scoring_pass import Clock
from label.scoring.shard_scorer import ScoringTools, score_shards

SIDE = 768
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Bench:
    """A loaded panel, pairs, and decoders."""

    folder: Path
    specs: dict[str, MetricSpec]
    panel: Panel
    pairs: PairSource
    decoder: DecodePool
    batch: Batch
    device: torch.device

    def pipeline(self) -> tuple[float, float, Clock]:
        """Score all pairs into a new folder; seconds, CPU seconds, and parts."""
        resolved = score_settings(self.specs, self.folder / "weights.json")
        sets = ScoreSets(Path(mkdtemp(dir=self.folder)), self.pairs.shards, resolved)
        clock = Clock()
        tools = ScoringTools(
            self.pairs, self.panel, sets, self.decoder,
            self.batch, clock, cache_bytes=2**30,
        )  # fmt: skip
        start, cpu = time.perf_counter(), time.process_time()
        score_shards(plan(sets, Rank()), tools)
        return time.perf_counter() - start, time.process_time() - cpu, clock

    def floor(self, num_images: int) -> tuple[float, float]:
        """Bare passes of every backbone over tensors that lie ready; seconds, CPU seconds."""
        pixels = torch.rand(self.batch.size, 3, 224, 224, device=self.device)
        start, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for backbone in self.backbones():
                model: Any = backbone
                see = partial(bare_pass, model, pixels.to(next(model._model.parameters()).dtype))
                for _ in range(num_images // self.batch.size):
                    see()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu

    def per_pair(self, num_pairs: int) -> tuple[float, float]:
        """Pairs one by one, each metric for itself, as the packages do; seconds, CPU seconds."""
        rows = next(self.pairs.read(self.pairs.shards[0], batch_rows=num_pairs)).to_pylist()
        start, cpu = time.perf_counter(), time.process_time()
        for row in rows:
            for metric in self.panel.metrics.values():
                assert isinstance(metric, EmbeddingMetric)
                transform = metric.resolved.transform
                both = [transform(decode(row[f"image_{side}"])) for side in (0, 1)]
                images = metric.backbone.embed_images(np.stack(both)).cpu()
                texts = images
                if metric.reads_prompt:
                    texts = metric.backbone.embed_texts([row["prompt"]]).cpu().expand(2, -1)
                metric.score(images, texts)
        return time.perf_counter() - start, time.process_time() - cpu

    def backbones(self) -> list[Backbone]:
        """The distinct backbones."""
        metrics = [m for m in self.panel.metrics.values() if isinstance(m, EmbeddingMetric)]
        return list({id(metric.backbone): metric.backbone for metric in metrics}.values())


def bare_pass(backbone: Any, pixels: torch.Tensor) -> None:
    """A forward pass of a backbone over pixels that lie ready, whatever class it has."""
    if isinstance(backbone, HfClipBackbone):
        backbone._see(pixel_values=pixels)
    else:
        backbone._see(pixels)


def compare(bench: Bench, num_images: int, num_per_pair: int, rounds: int) -> dict[str, Any]:
    """Bare passes, the pipeline and per-pair scoring in turns; medians of the ratios.

    In CPU seconds the ratios are less disturbed by other programs on the machine.
    """
    num_pairs = sum(shard.rows for shard in bench.pairs.shards)
    first_s, _, _ = bench.pipeline()  # with what happens once a run: first batches are checked
    floors, runs, pairs = [], [], []
    for _ in range(rounds):
        floors.append(bench.floor(num_images))
        runs.append(bench.pipeline())
        pairs.append(bench.per_pair(num_per_pair))
    took_s = median(run[0] for run in runs)

    def ratio(others: list[tuple[float, float]], which: int) -> float:
        ours = [(wall_s, cpu_s) for wall_s, cpu_s, _ in runs]
        return median(other[which] / own[which] for other, own in zip(others, ours, strict=True))

    seconds = runs[-1][2].seconds
    scale = num_pairs / num_per_pair
    return {
        "pairs": num_pairs,
        "distinct_images": num_images,
        "pairs_per_s": num_pairs / took_s,
        "floor_ratio": ratio(floors, 0),
        "floor_ratio_cpu": ratio(floors, 1),
        "per_pair_ratio": scale * ratio(pairs, 0),
        "per_pair_ratio_cpu": scale * ratio(pairs, 1),
        "first_run_s": first_s,
        "seconds": {"all": runs[-1][0]} | {part: seconds.get(part, 0.0) for part in PARTS[1:]},
    }


def predicted(bench: Bench, num_images: int) -> dict[str, float]:
    """What the counts alone say: per-pair scoring's passes, decodings, resizings over ours."""
    num_pairs = sum(shard.rows for shard in bench.pairs.shards)
    slots = 2 * num_pairs * len(bench.panel.metrics)
    transforms = {metric.resolved.transform for metric in bench.panel.metrics.values()}
    return {
        "predicted_model": slots / (num_images * len(bench.backbones())),
        "predicted_decode": slots / num_images,
        "predicted_resize": slots / (num_images * len(transforms)),
    }


def sized(size: dict[str, int], pairs: int, batch: int, rounds: int, one: int) -> dict[str, Any]:
    """A panel of this size on about so many pairs, whose images fill whole batches."""
    device = choose_device("device", "auto", Rank())
    while (num_images := distinct(pairs)) % batch:
        pairs += 1
    with tempfile.TemporaryDirectory() as name, DecodePool(WORKERS) as decoder:
        folder = Path(name)
        torch.manual_seed(0)
        specs = inputs.panel(folder, size, size)
        slots = inputs.write_pairs(folder / "pairs", pairs, (pairs + 1) // 2, SIDE)
        source = open_pairs(PairsSpec(root=str(folder / "pairs")))
        bench = Bench(
            folder, specs, Panel.load(specs, device), source, decoder, Batch(batch), device
        )
        result = compare(bench, num_images, one, rounds) | predicted(bench, num_images)
        return result | {"slots_per_image": slots, "batch": bench.batch.size}


def distinct(num_pairs: int) -> int:
    """Distinct images of so many pairs."""
    return len({image for _, *pair in inputs.repetition(num_pairs) for image in pair})
