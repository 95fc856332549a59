"""The parts of the day, in order of value: if time runs out, the last ones are not run."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

TRAINING = "benchmarks.gpu_day.training"
LABELS = "benchmarks.gpu_day.labels"
JUDGE = "benchmarks.gpu_day.judge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something to measure in a process of its own."""

    name: str
    function: str
    """A dotted name; gets the day's folder and `settings`, returns figures for the JSON."""
    expected_s: float
    """Estimated seconds on an H100."""
    limit_s: float
    """Seconds after which it is stopped."""
    on_gpu: Mapping[str, Any]
    reduced: Mapping[str, Any]
    """What of that changes in a dry run."""

    def settings(self, *, dry: bool) -> dict[str, Any]:
        """The keyword arguments of its function."""
        return {**self.on_gpu, **(self.reduced if dry else {})}


def part(name: str) -> Part:
    """The part of this name."""
    return next(part for part in PARTS if part.name == name)


# --- stage two -----------------------------------------------------------------------------------

SHAPES: Mapping[str, dict[str, Any]] = {
    "sd15": {"world": "sd15", "micro_batch": 8, "accumulation": 4, "steps": 4},
    "sdxl": {"world": "sdxl", "micro_batch": 2, "accumulation": 4, "steps": 3},
    "sd35": {"world": "sd35_medium", "micro_batch": 4, "accumulation": 2, "steps": 3, "texts": True,
             "options": {"gradient_checkpointing": "full"}},
    "flux": {"world": "flux_third", "micro_batch": 2, "accumulation": 4, "steps": 3, "texts": True,
             "options": {"gradient_checkpointing": "full", "lora_rank": 32}},
}  # fmt: skip
"""The experiments' micro-batches, on one GPU."""
REDUCED = {
    "sd15": {"world": "quick", "micro_batch": 1, "accumulation": 2, "steps": 1},
    "sdxl": {"world": "quick_xl", "micro_batch": 1, "accumulation": 1, "steps": 1},
    "sd35": {"world": "quick_sd3", "micro_batch": 1, "accumulation": 1, "steps": 1},
    "flux": {"world": "quick_flux", "micro_batch": 1, "accumulation": 1, "steps": 1},
}


def training(shape: str, what: str = "", **more: Any) -> Part:
    """A training with the experiment's settings but for some."""
    compiles = "compile" in more.get("options", {})
    return Part(
        name=f"{shape} {what}".strip(),
        function=f"{TRAINING}.measure",
        expected_s=(60 if compiles else 0) + (20 if shape == "sd15" else 35),
        limit_s=180 if compiles else 120,
        on_gpu={**SHAPES[shape], **more},
        reduced=REDUCED[shape],
    )


def floor(shape: str) -> Part:
    """The bare passes of the same model and micro-batch."""
    return Part(
        name=f"{shape} floor", function=f"{TRAINING}.floor",
        expected_s=15 if shape == "sd15" else 20, limit_s=90,
        on_gpu=SHAPES[shape], reduced=REDUCED[shape],
    )  # fmt: skip


def options(shape: str, names: tuple[str, ...]) -> Iterator[Part]:
    """A training for each of these settings, alone."""
    settings: Mapping[str, dict[str, Any]] = {
        "channels_last": {"channels_last": True},
        "selective": {"gradient_checkpointing": "selective"},
        "full": {"gradient_checkpointing": "full"},
        "compile": {"compile": True},
    }
    for name in names:
        yield training(shape, name, options=settings[name])


# --- stage one, the judge, the rest --------------------------------------------------------------

CORES = len(os.sched_getaffinity(0))


def labels(name: str, expected_s: float, variants: dict[str, Any], **more: Any) -> Part:
    """The paper's panel under some of stage one's settings."""
    small = {variant: {"batch": 4 * number} for number, variant in enumerate(variants, start=1)}
    return Part(
        name=name, function=f"{LABELS}.measure", expected_s=expected_s, limit_s=240,
        on_gpu={"size": "paper", "pairs": 1536, "side": 768, "variants": variants, **more},
        reduced={"size": "tiny", "pairs": 6, "side": 96, "variants": small},
    )  # fmt: skip


def sampling(shape: str, images: int, expected_s: float) -> Part:
    """Images of the shape's own size."""
    return Part(
        name=f"{shape} sampling", function=f"{JUDGE}.sampling", expected_s=expected_s, limit_s=120,
        on_gpu={"world": shape, "steps": 50, "images": images},
        reduced={"world": REDUCED[shape]["world"], "steps": 2, "images": 2},
    )  # fmt: skip


PARTS: tuple[Part, ...] = (
    Part(
        name="tests", function="benchmarks.gpu_day.gpu_tests.measure", expected_s=115, limit_s=180,
        on_gpu={}, reduced={},
    ),
    labels(
        "labels", 60,
        {
            "defaults": {},
            "threads": {"workers": 4},
        },
    ),
    training("sdxl"),
    training("flux"),
    training("sd15"),
    training("sd35"),
    floor("sdxl"),
    floor("sd15"),
    training("sdxl", "zero2", zero=2),
    training("sd15", "zero2", zero=2),
    sampling("sdxl", 8, 35),
    Part(
        name="scoring", function=f"{JUDGE}.scoring", expected_s=20, limit_s=90,
        on_gpu={"size": "paper", "images": 256, "side": 1024},
        reduced={"size": "tiny", "images": 4, "side": 96},
    ),
    Part(
        name="win rates", function="benchmarks.gpu_day.win_rates.measure",
        expected_s=70, limit_s=180, on_gpu={"overrides": []},
        reduced={"overrides": [
            "pairs.options.num_pairs=12", "train.steps=1", "train.batch=2", "train.micro_batch=2",
            "train.reference.every=1", "evaluate.prompts.max_prompts=2", "evaluate.steps=2",
            "evaluate.resamples=100",
        ]},
    ),
    *options("sd15", ("channels_last",)),
    *options("sdxl", ("channels_last", "selective", "full")),
    *options("sd15", ("selective", "full")),
    sampling("sd15", 16, 20),
    *options("sd15", ("compile",)),
    labels("labels compiled", 120, {"compiled": {"workers": CORES}}, compiled=True),
    *options("sdxl", ("compile",)),
)  # fmt: skip
