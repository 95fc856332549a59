"""Settings of the judge."""

import re
from dataclasses import dataclass, field

from data.dtypes import Dtype
from generate.config import PromptsSpec, Scheduler


@dataclass(kw_only=True, slots=True)
class EvaluateSpec:
    """How models are compared."""

    prompts: PromptsSpec = field(default_factory=PromptsSpec)
    """The prompts to draw."""
    models: dict[str, str] = field(default_factory=dict)
    """Name -> diffusers folder, hub id with its commit (`id@commit`), or LoRA weights to draw on
    `model.path`. Empty compares the run's base and trained model. On the command line:
    models.NAME=PATH."""
    base: str = "base"
    """Name of the model that the others are compared with."""
    seeds: int = 1
    """Images a prompt and model, each with its own initial noise."""
    steps: int = 50
    """Denoising steps."""
    scheduler: Scheduler = Scheduler.ddim
    """Which sampler draws."""
    dtype: Dtype = Dtype.fp32
    """Format of the generator's weights and activations."""
    guidance: float = 7.5
    """Classifier-free guidance scale; 1 switches it off."""
    batch: int = 16
    """Images drawn together; halved when the device runs out of memory; results do not depend on
    it."""
    judge_batch: int = 64
    """Images scored together."""
    judge_workers: int = 0
    """Threads that decode images ahead of the scorers; 0 decodes in the main thread."""
    device: str = "auto"
    """auto, cpu or cuda."""
    resamples: int = 10_000
    """Bootstrap resamples behind each interval."""
    gallery_pairs: int = 12
    """Side-by-side examples in each gallery of the report."""
    folder: str = "evaluate"
    """Folder below the run's; another prompt set or other settings need another one."""
    fail_when_worse: bool = False
    """End with exit status 3 when a model is shown to be worse by any metric (a gate)."""
    scores_only: bool = False
    """Make statistics and report anew from `scores.parquet` as it is; needs no model, no judge's
    weights and, but for the galleries, no images."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch", "judge_batch", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluate.{name}={getattr(self, name)}; it must be at least 1")
        if self.guidance < 1:
            raise ValueError(f"evaluate.guidance={self.guidance}; it must be at least 1")
        for name in ("gallery_pairs", "judge_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluate.{name}={getattr(self, name)}; it must not be negative")
        for what, name in [("folder", self.folder), *(("models", key) for key in self.models)]:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"evaluate.{what} has the name {name!r}; it becomes a folder, so use letters, "
                    "digits, '.', '_' and '-'"
                )
