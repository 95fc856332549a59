"""Settings of stage two."""

import math
from dataclasses import dataclass, field
from enum import Enum

PATIENCE_S = 1800.0
"""Of `train.patience_s`."""


class Precision(Enum):
    """Format of the policy's and the reference's weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """What gradient checkpointing computes again in the backward pass."""

    none = "none"
    """Nothing: every activation is remembered."""
    selective = "selective"
    """Norms, activation functions and sums; products, convolutions and attention are remembered."""
    full = "full"
    """Whole blocks: least memory, a quarter more work."""


@dataclass(kw_only=True, slots=True)
class ModelSpec:
    """The model to align: any diffusers folder of the SD1.x, SD2.x and SDXL families."""

    path: str = "???"
    """Diffusers folder, or a hub id `owner/name` (then `revision` is required)."""
    revision: str | None = None
    """The hub's 40-digit commit; never a branch, which changes under a run."""
    resolution: int = 512
    """Side of the square training images in pixels."""


@dataclass(kw_only=True, slots=True)
class LoraSpec:
    """Low-rank adaptation (Hu et al. 2021, Eq. 3): W + alpha / rank * B A, with W frozen."""

    rank: int = 0
    """Rows of A and columns of B; 0 trains all weights instead."""
    alpha: float | None = None
    """Strength of the adapter; null is the rank, so that the factor is 1."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Layers of the UNet that get one, by the ends of their names; by default the attentions'."""

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"train.lora.rank={self.rank}; it must not be negative")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"train.lora.alpha={self.alpha}; it must be above 0, or null")
        if self.rank and not self.targets:
            raise ValueError("train.lora.targets is empty; name at least one layer, such as to_q")


class Refresh(Enum):
    """How the reference model follows the policy."""

    frozen = "frozen"
    """Never: plain Diffusion-DPO."""
    snapshot = "snapshot"
    """A copy of the policy every K optimizer steps: the paper's dynamic reference."""
    ema = "ema"
    """Moved by `alpha` towards the policy every K optimizer steps (TR-DPO)."""


@dataclass(kw_only=True, slots=True)
class ReferenceSpec:
    """When and how the reference is renewed."""

    refresh: Refresh = Refresh.snapshot
    """The rule."""
    every: int = 50
    """K: optimizer steps between two refreshes."""
    alpha: float = 1.0
    """Share of the policy in a refreshed reference, for `ema`; in (0, 1]."""


@dataclass(kw_only=True, slots=True)
class ZeroSpec:
    """DeepSpeed's partitioning."""

    stage: int = 2
    """ZeRO stage 0 (none), 1 (optimizer), 2 (and gradients), 3 (and parameters)."""


class Objective(Enum):
    """What training minimises; the equations are in `train/dpo/loss.py`."""

    dpo = "dpo"
    """Diffusion-DPO (Wallace et al. 2023)."""
    margin_dpo = "margin_dpo"
    """The same, a pair weighing as much as its winner's lead in votes."""
    ipo = "ipo"
    """Identity preference optimization (Azar et al. 2023): a margin to reach, not to exceed."""
    sdpo = "sdpo"
    """DPO with the winner-preserving safeguard (Diffusion-SDPO, Fu et al. 2025)."""
    mapo = "mapo"
    """Reference-free baseline (Hong et al. 2024)."""


@dataclass(kw_only=True, slots=True)
class ObjectiveSpec:
    """The objective; its strength, for all but `mapo`, is `train.beta`."""

    kind: Objective = Objective.dpo
    """The objective."""
    mu: float = 0.9
    """Of `sdpo`: share of the winner's own progress that the loser may not take away, in [0, 1].
    Published: 0.9 for SD1.5, 0.6 for SDXL. At 1 losers that pull against winners are left alone."""
    mapo_beta: float = 0.1
    """Of `mapo`: weight of the preference against the winner's own error; the published one."""
    winner_weight: float = 1.0
    """Of `mapo`: weight of the winner's own error (the supervised part); 0 leaves it out."""

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise ValueError(f"train.objective.mu={self.mu}; it must be in [0, 1]")
        if not (self.mapo_beta > 0 and math.isfinite(self.mapo_beta)):
            raise ValueError(f"train.objective.mapo_beta={self.mapo_beta}; it must be above 0")
        if not (self.winner_weight >= 0 and math.isfinite(self.winner_weight)):
            raise ValueError(
                f"train.objective.winner_weight={self.winner_weight}; it must not be negative"
            )


class TimestepKind(Enum):
    """How a pair's timestep is drawn."""

    uniform = "uniform"
    """Every timestep alike."""
    importance = "importance"
    """Some parts of the schedule more often than others."""
    bucketed = "bucketed"
    """Every timestep alike, and each pair goes round the schedule from epoch to epoch."""


@dataclass(kw_only=True, slots=True)
class TimestepSpec:
    """The distribution of timesteps; whatever it is, a pair's depends on (seed, epoch, pair)."""

    kind: TimestepKind = TimestepKind.uniform
    """The rule."""
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 2.0, 3.0, 3.0])
    """Of `importance`: how often each of as many equal parts of the schedule is drawn, from least
    to most noise, in any unit. The loss is not divided by it: what is drawn more counts more."""
    buckets: int = 10
    """Of `bucketed`: equal parts of the schedule; in as many epochs a pair visits each once."""

    def __post_init__(self) -> None:
        good = all(math.isfinite(weight) and weight >= 0 for weight in self.weights)
        if not (self.weights and good and sum(self.weights) > 0):
            raise ValueError(
                f"train.timesteps.weights={self.weights}; give at least one number, "
                "none negative and not all 0"
            )
        if self.buckets < 1:
            raise ValueError(f"train.timesteps.buckets={self.buckets}; it must be at least 1")


class LatentUse(Enum):
    """Whether stage one's latents stand for the images."""

    auto = "auto"
    """Where a complete set fits the model; a run that is under way goes on as it began."""
    never = "never"
    """Images are decoded, and encoded by the VAE in every step."""
    always = "always"
    """Or the run is refused."""


@dataclass(kw_only=True, slots=True)
class ValidationSpec:
    """Pairs that are not trained on, to see whether what is learned carries over."""

    share: float = 0.0
    """Share of prompts whose pairs are held out, in [0, 1); by a hash of the prompt, so that none
    is on both sides, and the same in every run. 0 trains on all."""
    pairs: int = 128
    """Held-out pairs that are looked at, at most."""
    every: int = 50
    """Optimizer steps between two looks; the last step always has one."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"train.validation.share={self.share}; it must be in [0, 1)")
        for name in ("pairs", "every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"train.validation.{name}={getattr(self, name)}; it must be at least 1"
                )


@dataclass(kw_only=True, slots=True)
class SampleSpec:
    """Images of the same prompts from the same noise, drawn now and then while training."""

    every: int = 0
    """Optimizer steps between two sheets of images; 0 draws none."""
    prompts: list[str] = field(default_factory=list)
    """What to draw; empty takes the first `count` prompts of the label set."""
    count: int = 4
    """Images a sheet, where `prompts` names none."""
    steps: int = 20
    """Denoising steps (DDIM)."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 switches it off."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"train.samples.every={self.every}; it must not be negative")
        for name in ("count", "steps", "guidance"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"train.samples.{name}={getattr(self, name)}; it must be at least 1"
                )


@dataclass(kw_only=True, slots=True)
class TrainSpec:
    """How the policy is trained; together with the labels and the seed this decides the weights."""

    lora: LoraSpec = field(default_factory=LoraSpec)
    """Whether an adapter is trained instead of all weights."""
    reference: ReferenceSpec = field(default_factory=ReferenceSpec)
    """The reference model's renewal."""
    zero: ZeroSpec = field(default_factory=ZeroSpec)
    """DeepSpeed's partitioning."""
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    """What is minimised."""
    timesteps: TimestepSpec = field(default_factory=TimestepSpec)
    """Where in the noise schedule pairs are compared."""
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    """Held-out pairs."""
    samples: SampleSpec = field(default_factory=SampleSpec)
    """Images while training."""
    steps: int = 2000
    """Optimizer steps."""
    batch: int = 2048
    """Pairs an optimizer step, over all processes."""
    micro_batch: int = 8
    """Pairs a forward pass on one process, fewer where its share of a batch is smaller; batch must
    be a multiple of micro_batch x processes."""
    beta: float = 5000.0
    """Strength of the pull to the reference in the DPO loss, T folded in (Wallace et al. 2023);
    `mapo` has its own."""
    lr: float = 1e-8
    """Peak learning rate of AdamW."""
    warmup: int = 500
    """Optimizer steps of linear warm-up; constant afterwards."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    caption_dropout: float = 0.0
    """Rate of pairs trained with an empty prompt, in [0, 1]."""
    flip: bool = False
    """Mirror half of the pairs left to right, both images alike. Wrong where prompts say sides."""
    latents: LatentUse = LatentUse.auto
    """Whether to read the images' latents that stage one wrote (label.latents)."""
    precision: Precision = Precision.bf16
    """Format of weights and activations; errors and losses are fp32 whatever this is."""
    gradient_checkpointing: Recompute = Recompute.none
    """What the backward pass computes again, to save memory; it changes no number."""
    channels_last: bool = False
    """Keep the UNet's activations in channels-last memory; meant for GPUs in bf16."""
    compile: bool = False
    """Compile the UNet's transformer blocks (torch.compile): needs a C++ compiler, takes minutes at
    first, and does not go with ZeRO stage 3. See docs/training.md."""
    window: int = 16
    """Row groups whose rows are shuffled together."""
    memory_mb: int = 8192
    """Bound of the row groups that a process holds to shuffle in, in MiB; see `window`."""
    workers: int = 1
    """Threads that decode ahead of the step; 0 does it between steps."""
    checkpoint_every: int = 500
    """Optimizer steps between two checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 1
    """Optimizer steps between two journal lines."""
    wandb: str | None = None
    """Weights & Biases project that gets the journal, too; null sends nothing anywhere."""
    silence_s: float = 40.0
    """Of several processes: all end when one has not been heard for these many seconds. It is heard
    every second, whatever it computes; a process that was killed is noticed at once."""
    patience_s: float = PATIENCE_S
    """Of several processes: seconds that one waits for the others. Must be more than what the first
    does alone takes: hashing a checkpoint, writing the pipeline."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
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
        self._check_reference()

    def _check_ranges(self) -> None:
        counts = ("steps", "batch", "micro_batch", "window", "checkpoint_every", "keep")
        least = dict.fromkeys((*counts, "log_every"), 1) | {"silence_s": 3, "patience_s": 3}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"train.{name}={getattr(self, name)}; it must be at least {bound}")
        for name in ("warmup", "weight_decay", "clip_norm", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)}; it must not be negative")
        for name in ("beta", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name}={getattr(self, name)}; it must be above 0")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"train.caption_dropout={self.caption_dropout}; it is a rate in [0, 1]"
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
        if reference.refresh is Refresh.ema and not 0 < reference.alpha <= 1:
            raise ValueError(f"train.reference.alpha={reference.alpha}; it must be in (0, 1]")


WITHOUT_EFFECT = (
    "micro_batch", "gradient_checkpointing", "channels_last", "compile", "workers", "memory_mb",
    "checkpoint_every", "keep", "log_every", "device", "samples", "wandb", "latents",
    "silence_s", "patience_s",
)  # fmt: skip
"""Fields of `TrainSpec` that may change between two parts of a run: they decide no weight, or (the
first four) only how sums are rounded. Which images `latents` chose is noted apart."""
