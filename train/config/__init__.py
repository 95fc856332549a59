"""Settings of stage two: `TrainSpec`, whose sections are in the modules beside it."""

import math
from dataclasses import dataclass, field, fields
from enum import Enum

from train.config.buckets import BucketKind, BucketSpec
from train.config.model import (
    ActivationCheckpointing,
    LoraSpec,
    ModelSpec,
    Offload,
    Precision,
    Quantize,
    ZeroSpec,
)
from train.config.monitoring import ExportSpec, SampleSpec, ValidationSpec
from train.config.objective import (
    AUTO,
    LOGISTIC,
    AutoBetaSpec,
    Objective,
    ObjectiveSpec,
    ReferenceSpec,
    Refresh,
    TimestepKind,
    TimestepSpec,
)
from train.config.optimizer import OptimizerKind, OptimizerSpec

__all__ = [
    "AUTO", "COLLECTIVE_TIMEOUT_S", "LOGISTIC", "ActivationCheckpointing", "AutoBetaSpec",
    "BucketKind", "BucketSpec", "CacheUse", "ExportSpec", "LoraSpec", "LrSchedule", "ModelSpec",
    "Objective", "ObjectiveSpec", "Offload", "OptimizerKind", "OptimizerSpec",
    "Precision", "Quantize", "ReferenceSpec", "Refresh", "SampleSpec", "TimestepKind",
    "TimestepSpec", "TrainSpec", "ValidationSpec", "ZeroSpec", "resumable_fields",
]  # fmt: skip

COLLECTIVE_TIMEOUT_S = 1800.0
"""Default of `train.collective_timeout_s`."""

RESUMABLE = {"resumable": True}
"""Marks a field of `TrainSpec` that may change when a run is resumed: it decides no weight, or only
how sums are rounded."""


class CacheUse(Enum):
    """Whether what stage one has encoded is read, in place of encoding in every step."""

    auto = "auto"
    """Where there is a complete set that fits."""
    never = "never"
    always = "always"
    """Use it, or refuse to run."""


class LrSchedule(Enum):
    """How the learning rate goes on after the warm-up; equations in `train/trainer/trainer.py`."""

    constant = "constant"
    """It stays at `lr`."""
    linear = "linear"
    """It falls by the same amount each step."""
    cosine = "cosine"
    """It falls by half a period of a cosine: slowly at first and in the end."""


@dataclass(kw_only=True, slots=True)
class TrainSpec:
    """How the policy is trained; together with the labels and the seed this decides the weights."""

    lora: LoraSpec = field(default_factory=LoraSpec)
    """Trains an adapter instead of all weights."""
    reference: ReferenceSpec = field(default_factory=ReferenceSpec)
    """The reference model's renewal."""
    zero: ZeroSpec = field(default_factory=ZeroSpec)
    """DeepSpeed's partitioning."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """What is done with the gradients."""
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    """The loss."""
    buckets: BucketSpec = field(default_factory=BucketSpec)
    """The sizes to which images are cut."""
    timesteps: TimestepSpec = field(default_factory=TimestepSpec)
    """Where in the noise schedule pairs are compared."""
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    """Held-out pairs."""
    samples: SampleSpec = field(default_factory=SampleSpec, metadata=RESUMABLE)
    """Images generated while training."""
    export: ExportSpec = field(default_factory=ExportSpec, metadata=RESUMABLE)
    """What is written of the result."""
    steps: int = 2000
    """Optimizer steps."""
    batch: int = 2048
    """Pairs in an optimizer step, over all processes."""
    micro_batch: int = field(default=8, metadata=RESUMABLE)
    """Pairs in a forward pass on one process, at most its part of a batch; batch must be a multiple
    of micro_batch x processes."""
    beta: float | str = 5000.0
    """Strength of the pull to the reference in the DPO loss, T folded in (Wallace et al. 2023);
    `mapo` has its own. `auto` keeps the gradient's mean factor near `auto_beta.target`."""
    auto_beta: AutoBetaSpec = field(default_factory=AutoBetaSpec)
    """How `beta: auto` chooses it."""
    lr: float = 1e-8
    """Peak learning rate of AdamW."""
    warmup: int = 500
    """Optimizer steps of linear warm-up, before the schedule begins."""
    lr_schedule: LrSchedule = LrSchedule.constant
    """The learning rate after the warm-up."""
    lr_end: float = 0.0
    """For `linear` and `cosine`: the fraction of `lr` that they fall to, in [0, 1]; it is reached
    after the last step, so that no step has a rate of 0."""
    ema: float = 0.0
    """Decay of an exponential moving average of the policy's weights, in [0, 1), as in 0.999; it
    is exported beside the last weights and trains nothing. 0 keeps none."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null leaves them as they are."""
    caption_dropout: float = 0.0
    """Rate of pairs trained with an empty prompt, in [0, 1]."""
    flip: bool = False
    """Mirror half of the pairs left to right, both images alike. Wrong where prompts say sides."""
    latents: CacheUse = field(default=CacheUse.auto, metadata=RESUMABLE)
    """Whether to read the images' latents that stage one wrote (label.latents)."""
    texts: CacheUse = field(default=CacheUse.auto, metadata=RESUMABLE)
    """Whether to read the encoded prompts that stage one wrote (label.texts); then no text encoder
    is loaded."""
    precision: Precision = Precision.bf16
    """Format of weights and activations; errors and losses are fp32 whatever this is."""
    gradient_checkpointing: ActivationCheckpointing = field(
        default=ActivationCheckpointing.none, metadata=RESUMABLE
    )
    """What the backward pass computes again, to save memory; it changes no number."""
    channels_last: bool = field(default=False, metadata=RESUMABLE)
    """Keep the UNet's activations in channels-last memory; meant for GPUs in bf16."""
    reduce_dtype: Precision = field(default=Precision.fp32, metadata=RESUMABLE)
    """Format in which gradients are summed across processes; bf16 halves what is sent and loses
    digits at each sum. Under `precision: fp32` it is fp32 whatever this is."""
    overlap_comm: bool | None = field(default=None, metadata=RESUMABLE)
    """Communicate while the model computes, for memory for a second bucket; null does so under ZeRO
    stage 3 on GPUs."""
    compile: bool = field(default=False, metadata=RESUMABLE)
    """Compile the UNet's transformer blocks (torch.compile): needs a C++ compiler, takes minutes at
    first, and does not go with ZeRO stage 3. See docs/training.md."""
    window: int = 16
    """Row groups whose rows are shuffled together."""
    memory_mb: int = field(default=8192, metadata=RESUMABLE)
    """Most MiB of row groups that a process may keep in memory; see `window`."""
    workers: int | None = field(default=1, metadata=RESUMABLE)
    """Threads that decode images while a step runs; 0 decodes between steps, null takes a process's
    part of the machine's cores, at most 8."""
    checkpoint_every: int = field(default=500, metadata=RESUMABLE)
    """Optimizer steps between two checkpoints; the last step always has one."""
    keep: int = field(default=2, metadata=RESUMABLE)
    """Checkpoints kept."""
    log_every: int = field(default=1, metadata=RESUMABLE)
    """Optimizer steps between two lines of the metrics log (journal.jsonl)."""
    wandb: str | None = field(default=None, metadata=RESUMABLE)
    """Weights & Biases project to which the metrics log is also sent; null sends nothing."""
    collective_timeout_s: float = field(default=COLLECTIVE_TIMEOUT_S, metadata=RESUMABLE)
    """Seconds that a process waits for the others in a collective operation before it fails. Must
    exceed what the first process does alone: hashing a checkpoint, writing the pipeline."""
    advise: bool = field(default=False, metadata=RESUMABLE)
    """Only read the metrics log of a run, and print which beta would have had which mean gradient
    factor in its first steps."""
    device: str = field(default="auto", metadata=RESUMABLE)
    """auto, cpu or cuda; each process of a machine takes its own GPU."""

    @property
    def reference_is_base(self) -> bool:
        """Whether an adapter is compared with the bare base: it started there, and none moves."""
        return self.lora.start is None and self.reference.refresh is Refresh.frozen

    @property
    def first_beta(self) -> float:
        """Beta of the first step; of all steps unless it is `auto`."""
        return self.auto_beta.start if isinstance(self.beta, str) else self.beta

    @property
    def is_beta_auto(self) -> bool:
        """Whether beta changes while training."""
        return self.beta == AUTO

    def __post_init__(self) -> None:
        self._check_beta()
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema={self.ema}; it must be in [0, 1), 0 for no average")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"train.device={self.device!r}; allowed are auto, cpu and cuda")
        if not 0 <= self.zero.stage <= 3:
            raise ValueError(f"zero.stage={self.zero.stage}; allowed are 0, 1, 2 and 3")
        if self.compile and self.zero.stage == 3:
            raise ValueError(
                "train.compile=true with zero.stage=3: parameters are gathered while the model "
                "runs, which compiled blocks do not see; choose zero=stage2 or train.compile=false"
            )
        self._check_ranges()
        if self.batch % self.micro_batch:
            raise ValueError(
                f"train.batch={self.batch} is no multiple of train.micro_batch={self.micro_batch}; "
                "change one of them"
            )
        self.buckets.check_batches(self.batch, self.micro_batch)
        self._check_lr_schedule()
        self._check_reference()

    def _check_ranges(self) -> None:
        counts = ("steps", "batch", "micro_batch", "window", "checkpoint_every", "keep")
        least = dict.fromkeys((*counts, "log_every", "memory_mb"), 1) | {"collective_timeout_s": 3}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"train.{name}={getattr(self, name)}; it must be at least {bound}")
        for name in ("warmup", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}; it must not be negative")
        if not self.lr > 0:
            raise ValueError(f"train.lr={self.lr}; it must be above 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"train.clip_norm={self.clip_norm}; it must be above 0, or null")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"train.caption_dropout={self.caption_dropout}; it is a rate in [0, 1]"
            )

    def _check_beta(self) -> None:
        """Read a number that was given as text; refuse what is neither a number nor auto."""
        if self.is_beta_auto:
            self.auto_beta.check_objective(self.objective)
            if self.warmup >= self.steps:
                raise ValueError(
                    f"train.beta=auto never begins: train.warmup={self.warmup} takes all of "
                    f"train.steps={self.steps}; lower train.warmup, or set train.beta to a number"
                )
            return
        try:
            beta = float(self.beta)
        except ValueError:
            beta = math.nan
        if not 0 < beta < math.inf:
            raise ValueError(f"train.beta={self.beta}; it must be a number above 0, or auto")
        self.beta = beta
        for item in fields(AutoBetaSpec):
            if (value := getattr(self.auto_beta, item.name)) != item.default:
                raise ValueError(
                    f"train.auto_beta.{item.name}={value} has no meaning for train.beta={beta:g}; "
                    "set train.beta=auto, or leave it out"
                )

    def _check_lr_schedule(self) -> None:
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"train.lr_end={self.lr_end}; it must be in [0, 1]")
        if self.lr_schedule is LrSchedule.constant:
            if self.lr_end:
                raise ValueError(
                    f"train.lr_end={self.lr_end:g} has no meaning for train.lr_schedule=constant; "
                    "choose linear or cosine, or leave it out"
                )
        elif self.warmup >= self.steps:
            raise ValueError(
                f"train.lr_schedule={self.lr_schedule.value} never begins: train.warmup="
                f"{self.warmup} takes all of train.steps={self.steps}; lower train.warmup"
            )

    def _check_reference(self) -> None:
        reference = self.reference
        if reference.refresh is Refresh.frozen:
            return
        if self.objective.kind is Objective.mapo:
            raise ValueError(
                "train.objective.kind=mapo compares with no reference, but train.reference.refresh="
                f"{reference.refresh.value} would renew one; choose reference=frozen"
            )
        if not 0 < reference.every <= self.steps:
            raise ValueError(
                f"train.reference.every={reference.every} never happens within "
                f"train.steps={self.steps}; lower it, or choose reference=frozen"
            )


def resumable_fields() -> set[str]:
    """Names of the fields of `TrainSpec` that may change when a run is resumed."""
    return {item.name for item in fields(TrainSpec) if item.metadata.get("resumable")}
