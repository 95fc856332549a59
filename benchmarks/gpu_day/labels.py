"""Images a second of stage one with the paper's panel, and which of its parts the others wait for.

Decoding, copying and the networks are also timed alone. The slowest of the three is what the whole
waits for, and the whole can be no faster.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import inputs
from benchmarks.decode import decode_alone
from benchmarks.memory import reset_peak, used_mib
from benchmarks.once import once
from benchmarks.pipeline import Bench, bare_pass
from data.devices import choose_device
from data.distributed import Rank, num_workers
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairSource
from label.config import LabelSpec, MetricSpec
from label.metrics.preprocessing import ResizeMode
from label.metrics.protocols import EmbeddingMetric
from label.metrics.registry import settle_dtypes
from label.scoring.batching import Batch
from label.scoring.decode_pool import MOST_DECODERS, DecodePool
from label.scoring.panel import Panel
from label.scoring.runner import PARTS, check_compiler
from train.models.flops import peak_flops

SIZES = {
    "paper": (inputs.VIT_L, inputs.VIT_H),
    "tiny": (inputs.TINY, inputs.TINY),
}
"""The CLIP of CLIP score and aesthetic head, and that of PickScore and HPS."""


def measure(
    folder: Path,
    *,
    size: str,
    pairs: int,
    side: int,
    variants: Mapping[str, Mapping[str, Any]],
    compiled: bool = False,
) -> dict[str, Any]:
    """Label `pairs` pairs of `side` pixels under each variant of `LabelSpec`'s settings."""
    device = choose_device("label.device", "auto", Rank())
    if compiled:
        check_compiler(device)
    specs = settle_dtypes(panel(folder, size), on_gpu=device.type == "cuda")
    root = once(
        folder / f"pairs-{side}-{pairs}",
        lambda place: inputs.write_pairs(place, pairs, max(1, pairs // 4), side),
    )
    loaded = Panel.load(specs, device, compiled=compiled)
    source, results = open_pairs(PairsSpec(root=str(root))), dict[str, Any]()
    for name, changes in variants.items():
        spec = LabelSpec(**{"compile": compiled, **changes})
        workers = num_workers(spec.workers, most=MOST_DECODERS)
        with DecodePool(workers) as decoder:
            bench = Bench(folder, specs, loaded, source, decoder, Batch(spec.batch), device)
            results[name] = whole(bench) | alone(bench, source)
            results[name]["settings"] = {"batch": spec.batch, "workers": workers}
    flops = image_flops(bench)
    rows = [row(name, result, flops, device) for name, result in results.items()]
    return {"rows": rows, "gflop_an_image": flops / 1e9, "variants": results}


def panel(folder: Path, size: str) -> dict[str, MetricSpec]:
    """The paper's panel in the number format that the device takes by default, written once."""

    def write(place: Path) -> None:
        torch.manual_seed(0)
        inputs.panel(place, *SIZES[size])

    return inputs.panel_at(once(folder / f"panel-{size}", write), None)


def whole(bench: Bench) -> dict[str, Any]:
    """The whole stage, after a run in which batches are checked and kernels are chosen."""
    reset_peak(bench.device)
    bench.pipeline()
    (took_s, _, clock), busy = watched(bench.pipeline)
    images = num_images(bench.pairs)
    return {
        "images_per_s": images / took_s,
        "images": images,
        "main_thread": {part: clock.seconds.get(part, 0.0) / took_s for part in PARTS[1:]},
        "gpu_busy": busy,
        "batch_after": bench.batch.size,
        "peak_gib": used_mib(bench.device, peak=True) / 2**10,
    }


def alone(bench: Bench, source: PairSource) -> dict[str, float]:
    """Images a second of decoding, of copying and of the networks, each without the others."""
    rows = [row for shard in source.shards for part in source.read(shard) for row in
            part.to_pylist()]  # fmt: skip
    contents = list({row[f"image_{number}"] for row in rows for number in (0, 1)})
    began = time.perf_counter()
    decode_alone(bench.decoder, contents)
    decoded_s = time.perf_counter() - began
    copied_s = copy_s(bench, len(contents))
    bench.floor(2 * bench.batch.size)
    batches = max(1, len(contents) // bench.batch.size)
    networks_s, _ = bench.floor(batches * bench.batch.size)
    return {
        "decode_alone": len(contents) / decoded_s,
        "copy_alone": len(contents) / copied_s,
        "networks_alone": batches * bench.batch.size / networks_s,
    }


def copy_s(bench: Bench, images: int) -> float:
    """Seconds in which so many prepared images are stacked, copied and normalised."""
    metrics = [m for m in bench.panel.metrics.values() if isinstance(m, EmbeddingMetric)]
    by_backbone = {id(metric.backbone): metric for metric in metrics}.values()
    seconds, batches = 0.0, max(1, images // bench.batch.size)
    for metric in by_backbone:
        transform, backbone = metric.resolved.transform, metric.backbone
        kind = np.float32 if transform.mode is ResizeMode.PAD else np.uint8
        prepared = [np.zeros((transform.side, transform.side, 3), kind)] * bench.batch.size
        pixels: Any = backbone
        for warm in (True, False):
            began = time.perf_counter()
            for _ in range(1 if warm else batches):
                pixels._pixels(np.stack(prepared))
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += 0.0 if warm else time.perf_counter() - began
    return seconds


def image_flops(bench: Bench) -> int:
    """Operations of all networks for one image."""
    total = 0
    for backbone in bench.backbones():
        network: Any = backbone
        dtype = next(network._model.parameters()).dtype
        pixels = torch.zeros(1, 3, 224, 224, device=bench.device, dtype=dtype)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            eager(network, pixels)
        total += counter.get_total_flops()
    return total


def eager(backbone: Any, pixels: torch.Tensor) -> None:
    """A forward pass whose operations can be counted, also of a compiled backbone."""
    with torch.compiler.set_stance("force_eager"):
        bare_pass(backbone, pixels)


def row(name: str, result: Mapping[str, Any], flops: int, device: torch.device) -> dict[str, Any]:
    """The variant's row in the table."""
    peak, rate = peak_flops(device), result["images_per_s"]
    parts = {key.partition("_")[0]: value for key, value in result.items() if "_alone" in key}
    slowest = min(parts, key=lambda part: parts[part])
    each = ", ".join(f"{part} {value:.0f}" for part, value in parts.items())
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    return {
        "name": f"{name} ({settings})",
        "rate": rate,
        "unit": "images/s",
        "peak_fraction": rate * flops / peak if peak else None,
        "peak_gib": result["peak_gib"],
        "note": f"waits for {slowest}; alone {each}",
    }


def num_images(source: PairSource) -> int:
    """Distinct images of a benchmark's pairs."""
    return len({image for _, *pair in inputs.repetition(sum(shard.rows for shard in source.shards))
                for image in pair})  # fmt: skip


def watched(
    run: Callable[[], tuple[float, float, Any]],
) -> tuple[tuple[float, float, Any], float | None]:
    """A run's result, and the mean fraction of time in which the GPU was busy, if that is known."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not torch.cuda.is_available():
        return run(), None
    ask = [tool, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms=200"]
    with subprocess.Popen(ask, stdout=subprocess.PIPE, text=True) as watcher:
        result = run()
        watcher.terminate()
        printed = watcher.communicate()[0]
    busy = [float(line) for line in printed.split() if line.isdigit()]
    return result, sum(busy) / len(busy) / 100 if busy else None
