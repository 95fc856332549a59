"""Images a second of `make eval`: sampling them, and scoring them by the paper's panel."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_day.labels import panel
from benchmarks.inputs import jpeg
from benchmarks.memory import used_mib
from benchmarks.worlds import WORDS, WORLDS, model_folder
from data.devices import Dtype, choose_device
from data.distributed import Rank, num_workers
from data.families import sd1
from data.images import Size, decode, encode_png
from data.models.family import Condition
from evaluate.config import EvaluateSpec
from generate.config import Scheduler
from generate.image_files import Model
from generate.sampler import ImageGenerator
from label.metrics.registry import settle_dtypes
from label.scoring.panel import Panel
from train.models.flops import forward_flops, peak_flops

TOKENS = 77
WARM_UP_STEPS = 2


def sampling(folder: Path, *, world: str, steps: int, images: int) -> dict[str, Any]:
    """Sample a batch of `images` in `steps` steps with guidance, in bf16 as the experiments do."""
    device = choose_device("evaluate.device", "auto", Rank())
    generator = ImageGenerator.load(
        Model(name="base", path=str(model_folder(WORLDS[world], folder))),
        device,
        scheduler=Scheduler.ddim,
        dtype=Dtype.bf16 if device.type == "cuda" else Dtype.fp32,
        size=Size(WORLDS[world].resolution, WORLDS[world].resolution),
        steps=WARM_UP_STEPS,
        guidance=EvaluateSpec().guidance,
    )
    prompts = [f"a {WORDS[number % len(WORDS)]} {number}" for number in range(images)]
    generator.sample(prompts, range(images))
    generator.settings["num_inference_steps"] = steps
    took_s = seconds_of(lambda: generator.sample(prompts, range(images)))
    unet, rate, peak = generator.pipeline.unet, images / took_s, peak_flops(device)
    flops = (
        2
        * steps
        * forward_flops(unet, generator.family or sd1.FAMILY, generator.shape, condition_of(unet))
    )
    row = {
        "rate": rate,
        "unit": "images/s",
        "peak_fraction": rate * flops / peak if peak else None,
        "peak_gib": used_mib(device, peak=True) / 2**10,
        "note": f"{images} at once, {steps} steps",
    }
    return {"rows": [row], "images_per_s": rate, "tflop_an_image": flops / 1e12}


def condition_of(unet: Any) -> Condition:
    """A condition of the shape that a UNet takes."""
    config = unet.config
    states = torch.zeros(1, TOKENS, config.cross_attention_dim)
    if config.addition_embed_type != "text_time":
        return Condition(states)
    ids = 6 * config.addition_time_embed_dim
    pooled = torch.zeros(1, config.projection_class_embeddings_input_dim - ids)
    return Condition(states, {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)})


def scoring(folder: Path, *, size: str, images: int, side: int) -> dict[str, Any]:
    """Score `images` PNGs of `side` pixels by the panel, with the settings of `make eval`."""
    device, spec = choose_device("evaluate.device", "auto", Rank()), EvaluateSpec()
    scorers = Panel.load(settle_dtypes(panel(folder, size), on_gpu=device.type == "cuda"), device)
    workers = num_workers(spec.judge_workers)
    with ThreadPoolExecutor(workers) as threads:
        contents = list(threads.map(lambda number: png(number, side), range(images)))
    prompts = [f"a {WORDS[number // 2 % len(WORDS)]}" for number in range(images)]

    def score() -> None:
        scorers.score(contents, prompts, batch=min(spec.judge_batch, images), workers=workers)

    score()
    rate = images / seconds_of(score)
    row = {
        "rate": rate,
        "unit": "images/s",
        "peak_gib": used_mib(device, peak=True) / 2**10,
        "note": f"{side}-pixel PNGs, {workers} threads",
    }
    return {"rows": [row], "images_per_s": rate, "workers": workers}


def png(number: int, side: int) -> bytes:
    """A PNG like a generated image."""
    return encode_png(np.asarray(decode(jpeg(number, side))))


def seconds_of(work: Callable[[], Any]) -> float:
    """How long work takes whose result is on the host."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
