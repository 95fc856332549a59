"""What reuse saves, what number formats change, and how memory grows."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import inputs
from benchmarks.pipeline import Bench
from data.devices import Dtype, choose_device
from data.distributed import Rank
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from label.config import MetricSpec
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.embedding_cache import EmbeddingCache
from label.scoring.panel import Panel

IMAGE_BYTES = 12_700
"""An image in memory with the paper's four metrics at their real sizes."""
WEIGHTS = Path("data/miniature/weights")


def reuse(num_pairs: int, per_shard: int = 1500) -> dict[str, float]:
    """Embeddings an image, by how long they are remembered; 1 is the least."""
    rows = list(inputs.repetition(num_pairs))
    images = len({image for _, *pair in rows for image in pair})

    def built(limit: int, forget: bool = False) -> float:
        memory, new = EmbeddingCache(limit, IMAGE_BYTES, IMAGE_BYTES), 0
        for number, (_, *pair) in enumerate(rows):
            if forget and number % per_shard == 0:
                memory.forget()
            new += sum(memory.image(image.to_bytes(8, "little"))[1] for image in pair)
        return new / images

    return {
        "every_slot": 2 * num_pairs / images,
        "within_a_shard": built(2**60, forget=True),
        "label.cache_mb=256": built(2**28),
        "label.cache_mb=1024": built(2**30),
        "always": built(2**60),
    }


def precision(num_pairs: int) -> dict[str, dict[str, float]]:
    """Share of votes of the miniature's metrics that other number formats change."""
    from data.pairs.miniature import ensure_pairs

    kinds = ("hps", "clip", "pickscore", "aesthetic")
    with tempfile.TemporaryDirectory() as name:
        ensure_pairs(Path(name), num_pairs)
        source = open_pairs(PairsSpec(root=name))
        rows = [r for s in source.shards for t in source.read(s) for r in t.to_pylist()][:num_pairs]
    images = [row[f"image_{side}"] or b"" for row in rows for side in (0, 1)]
    prompts = [row["prompt"] or "" for row in rows for _ in (0, 1)]
    votes = {}
    for dtype in Dtype:
        specs = {kind: miniature(kind, dtype) for kind in kinds}
        scores = Panel.load(specs, choose_device("device", "auto", Rank())).score(images, prompts)
        votes[dtype] = {k: np.sign(v.reshape(-1, 2) @ [1.0, -1.0]) for k, v in scores.items()}
    changed = {}
    for dtype in (Dtype.bf16, Dtype.fp16):
        shares = {
            kind: float(np.mean((votes[dtype][kind] != votes[Dtype.fp32][kind])[
                ~np.isnan(votes[Dtype.fp32][kind])])) for kind in kinds
        }  # fmt: skip
        wins = [np.sign(np.nansum([votes[d][k] for k in kinds], 0)) for d in (dtype, Dtype.fp32)]
        changed[dtype.value] = shares | {"majority": float(np.mean(wins[0] != wins[1]))}
    return changed


def miniature(kind: str, dtype: Dtype) -> MetricSpec:
    """The embedded scorer of a kind, as conf/metric/miniature_*.yaml has it."""
    folder = WEIGHTS / ("clip" if kind == "aesthetic" else kind)
    head = str(next((WEIGHTS / "aesthetic").glob("*.safetensors")))
    return MetricSpec(
        kind=kind,
        weights=str(folder),
        dtype=dtype,
        head=head if kind == "aesthetic" else "",
    )


def memory(num_pairs: int) -> float:
    """Peak memory in MB of a process that scores so many pairs."""
    command = [sys.executable, "-m", "benchmarks.label", "--memory", str(num_pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_here(num_pairs: int) -> None:
    """Score so many pairs in files of 64 and print the peak."""
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name, DecodePool(1) as decoder:
        folder = Path(name)
        specs = inputs.panel(folder, inputs.TINY, inputs.TINY)
        inputs.write_pairs(folder / "pairs", num_pairs, 64, 384)
        source = open_pairs(PairsSpec(root=str(folder / "pairs")))
        Bench(
            folder, specs, Panel.load(specs, device), source, decoder, Batch(16), device
        ).pipeline()
    said = Path("/proc/self/status").read_text()  # getrusage's peak is inherited from the parent
    print(int(said.partition("VmHWM:")[2].split()[0]) / 1024)
