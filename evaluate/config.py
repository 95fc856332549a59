"""Settings of a comparison of models."""

import re
import shlex
from dataclasses import dataclass, field
from enum import Enum

from data.devices import Dtype, check_device
from data.images import Size
from data.pairs.config import PairsSpec
from generate.config import PromptsSpec, Scheduler, check_sides

OTHER_STAGES = ("scores", "latents", "texts", "labels", "train")
"""Folders of a run that the stages before write."""


class Unreadable(Enum):
    """What becomes of a judge that cannot read some of the prompts."""

    refuse = "refuse"
    """The comparison is refused before any image is generated."""
    leave_out = "leave_out"
    """The comparison does without the judge, and says so."""


@dataclass(kw_only=True, slots=True)
class EvaluateSpec:
    """How models are compared."""

    prompts: PromptsSpec = field(default_factory=PromptsSpec)
    """The prompts to sample images for."""
    models: dict[str, str] = field(default_factory=dict)
    """Name -> diffusers folder, hub id with its commit (`id@commit`), or LoRA weights for
    `model.path`. Empty compares the run's base and trained model. On the command line:
    models.NAME=PATH."""
    unreadable: Unreadable = Unreadable.refuse
    """What becomes of a judge that cannot read some of the prompts, as the miniature's oracle reads
    only those of its own world: `refuse` the comparison, or `leave_out` the judge."""
    base: str = "base"
    """The name of the model that the others are compared with."""
    seeds: int = 1
    """Images per prompt and model, each with its own initial noise."""
    steps: int = 50
    """Denoising steps."""
    scheduler: Scheduler = Scheduler.ddim
    """The scheduler that images are sampled with."""
    dtype: Dtype = Dtype.fp32
    """The format of the models' weights and activations."""
    guidance: float = 7.5
    """Classifier-free guidance scale; 1 switches it off."""
    width: int | None = None
    """Width of the images in pixels; null is `model.resolution`."""
    height: int | None = None
    """Height of the images in pixels; null is `model.resolution`."""
    batch: int = 16
    """Images sampled together; halved when the device runs out of memory. Results do not depend
    on it."""
    judge_batch: int = 64
    """Images scored together."""
    judge_workers: int | None = None
    """Threads that decode images before they are scored; 0 decodes in the main thread, null takes a
    process's part of the machine's cores, at most 8."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; with several processes a machine, each takes its own GPU."""
    cpu_offload: bool = False
    """Keep only the part of a model on the GPU that is running: slower, for models that do not fit.
    It changes no image."""
    distance_images: int = 64
    """Images of the base, each of another prompt, on which the denoisers of base and model are
    compared; 0 leaves that out."""
    resamples: int = 10_000
    """Bootstrap resamples behind each interval."""
    gallery_pairs: int = 12
    """Side-by-side examples in each gallery of the report."""
    folder: str = "evaluate"
    """Subfolder of the run's folder; another prompt set or other settings need another one."""
    reuse: str = ""
    """Folder of another comparison (`runs/<run>/evaluate`). Images there that were made by the same
    model with the same settings are linked into this one; what is missing is sampled."""
    fail_when_worse: bool = False
    """Exit with status 3 when any metric shows a model to be worse (a gate)."""
    scores_only: bool = False
    """Recompute statistics and report from the existing `scores.parquet`; needs no model and no
    judge's weights, and images only for the galleries."""

    def size(self, resolution: int) -> Size:
        """The size of the images; `resolution` is the model's."""
        return Size(self.width or resolution, self.height or resolution)

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch", "judge_batch", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluate.{name}={getattr(self, name)}; it must be at least 1")
        check_device("evaluate.device", self.device)
        check_sides("evaluate", self.width, self.height)
        if self.guidance < 1:
            raise ValueError(f"evaluate.guidance={self.guidance}; it must be at least 1")
        for name in ("gallery_pairs", "judge_workers", "distance_images"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"evaluate.{name}={getattr(self, name)}; it must not be negative")
        self._check_names()

    def _check_names(self) -> None:
        for what, name in [("folder", self.folder), *(("models", key) for key in self.models)]:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"evaluate.{what} has the name {name!r}; it becomes a folder, so use letters, "
                    "digits, '.', '_' and '-'"
                )
        if self.folder in OTHER_STAGES:
            raise ValueError(
                f"evaluate.folder={self.folder} is the folder of another stage; choose another name"
            )


@dataclass(kw_only=True, slots=True)
class RoundsSpec:
    """Rounds of generating, labelling, training and judging (`make rounds`)."""

    count: int = 3
    """Rounds in all; more may be added later by the same command."""
    stop_when_worse: bool = True
    """Stop after a round that a held-out judge shows to be worse than the base or than the round
    before."""
    mix: float = 0.0
    """Fraction of a round's pairs that is not its own but of earlier rounds, or of `mix_pairs`, in
    [0, 1). Whole prompts, drawn from `seed`; of earlier rounds at most all of their pairs."""
    mix_pairs: PairsSpec = field(default_factory=lambda: PairsSpec(root=""))
    """A pair set to mix in, with the settings of `pairs` (pairs@rounds.mix_pairs=pickapic chooses a
    layout); without a root, pairs of earlier rounds are mixed in."""
    launcher: str = ""
    """What starts a stage on all processes: its words come before the stage's name, as in `torchrun
    --standalone --nproc-per-node=8 -m` or `srun .venv/bin/python -m`. Empty starts one process."""
    dry_run: bool = False
    """Only print the commands."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"rounds.count={self.count} (ROUNDS); it must be at least 1")
        if not 0 <= self.mix < 1:
            raise ValueError(
                f"rounds.mix={self.mix}; it is a fraction of a round's pairs, in [0, 1)"
            )
        if self.mix_pairs.root and not self.mix:
            raise ValueError(
                f"rounds.mix_pairs.root={self.mix_pairs.root} needs rounds.mix, the fraction of "
                "each round's pairs that is taken from it"
            )
        try:
            shlex.split(self.launcher)
        except ValueError as error:
            raise ValueError(
                f"rounds.launcher={self.launcher!r} cannot be cut into words ({error}); close its "
                "quotes"
            ) from error
