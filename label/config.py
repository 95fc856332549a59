"""Settings of stage one."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from data.devices import Dtype, check_device


@dataclass(kw_only=True, slots=True)
class MetricSpec:
    """One scorer: which weights, and every choice that changes its scores."""

    kind: str
    """Which kind of scorer: the name of a file in label/metrics/ (clip, hps, ...), or the dotted
    name of a module of yours, such as my_package.my_metric."""
    weights: str = ""
    """Folder or file of the weights, or a hub id (then `revision` is required)."""
    revision: str | None = None
    """The hub's 40-digit commit; never a branch."""
    tokenizer: str = ""
    """Folder or hub id of the tokenizer, where it does not lie beside the weights (image_reward
    and cycle_reward: bert-base-uncased)."""
    tokenizer_revision: str | None = None
    """The 40-digit commit of the tokenizer's hub id."""
    template: str = ""
    """The instruction, a text file with {text_prompt} and <|Reward|> in it, or the official code's
    file that has it (hps_v3 only)."""
    head: str = ""
    """Weights of the head on top of the backbone (aesthetic only)."""
    sha256: str = ""
    """SHA-256 that the weights file (the head, where there is one) must have; empty takes any."""
    arch: str = "ViT-H-14"
    """open_clip's name of the architecture, where the weights are a bare file (hps only)."""
    dtype: Dtype | None = Dtype.fp32
    """Number format of the networks; scores are fp32 whatever this is. Null is fp16 on GPUs and
    fp32 on CPUs. It is recorded with the scores, and a set in another format is refused."""
    antialias: bool = True
    """Antialias when an image is made smaller on float tensors (hps only): published HPSv2 numbers
    differ in this, because torchvision changed its default."""
    condition: str = ""
    """Words that say what is judged (mps only); the published list means overall preference."""
    threshold: float = 0.3
    """How related to the condition a token of the prompt must be to be seen, in parts of the most
    related one's, in [0, 1) (mps only). The published scripts have 0.3, the model file 0.01."""
    tie: float = 0.0
    """Score gaps up to this abstain; in the metric's own units."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a metric of your own; recorded with its scores."""


@dataclass(kw_only=True, slots=True)
class PanelSpec:
    """Who votes, and who judges without a vote."""

    voters: list[str] = field(default_factory=list)
    """Names in `metrics` whose votes make the labels."""
    held_out: list[str] = field(default_factory=list)
    """Judges of the evaluation that never saw the labels."""
    oracle: list[str] = field(default_factory=list)
    """Judges that know the truth; the miniature world has one."""


class Rule(Enum):
    """How votes become a winner."""

    majority = "majority"
    """More votes than the other image: the paper's consensus."""
    unanimous = "unanimous"
    """Every voter that does not abstain agrees."""
    at_least = "at_least"
    """At least `votes` votes, and more than the other image."""
    single = "single"
    """One metric alone."""
    human = "human"
    """The human label."""
    random = "random"
    """A coin, thrown per pair_id and seed."""
    sum = "sum"
    """The larger sum of raw scores ("vanilla aggregation")."""
    zscore_sum = "zscore_sum"
    """The larger sum of standardised scores ("normalized aggregation")."""


COUNTING = (Rule.majority, Rule.unanimous, Rule.at_least)
"""Rules that count votes, so that the human label can be one more."""


WEIGHTED = (Rule.majority, Rule.at_least, Rule.sum, Rule.zscore_sum)
"""Rules that read `vote.weights`."""


HUMAN = "human"
"""The human label among the voters."""


class TieRule(Enum):
    """What decides when the rule does not."""

    drop = "drop"
    """Nothing: the pair keeps its row and has no winner."""
    human = "human"
    """The human label, if it is no tie itself."""
    metric = "metric"
    """The vote of the metric named in `tie_metric`."""


class Select(Enum):
    """Which of a prompt's decided pairs keep their winner."""

    all = "all"
    """Every one."""
    extremes = "extremes"
    """Only the pair between the images with most and fewest wins (Copeland's count)."""


@dataclass(kw_only=True, slots=True)
class VoteSpec:
    """How scores become labels. Each vote writes its own set, `labels/<name>/`."""

    name: str = "majority"
    """Folder of the label set."""
    rule: Rule = Rule.majority
    """How votes become a winner."""
    tie_rule: TieRule = TieRule.drop
    """What decides when the rule does not; with four voters about a third of pairs are 2:2."""
    tie_metric: str = ""
    """The run_identity metric of `tie_rule: metric`."""
    metric: str = ""
    """The metric of `rule: single`."""
    votes: int = 0
    """Votes needed by `rule: at_least`."""
    human_votes: bool = False
    """Whether the human label is one more voter."""
    weights: dict[str, float] = field(default_factory=dict)
    """Voter (a metric, or `human`) -> its number of votes; 1 where it is not named. Whole numbers:
    ties stay exact, and `votes_*` and `margin` count votes. For 1.5 against 1, write 3 and 2."""
    select: Select = Select.all
    """Which of a prompt's decided pairs keep their winner, where there are several."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"vote.name={self.name!r}; it begins with a letter or digit, then '.', '_' and '-' "
                "are allowed too"
            )
        if self.rule is Rule.at_least and self.votes < 1:
            raise ValueError(f"vote.votes={self.votes}; vote.rule=at_least needs at least 1")
        if self.rule is Rule.single and not self.metric:
            raise ValueError("vote.rule=single needs vote.metric, the name of a metric")
        if self.tie_rule is TieRule.metric and not self.tie_metric:
            raise ValueError("vote.tie_rule=metric needs vote.tie_metric, the name of a metric")
        self._refuse_unused()
        self._check_weights()

    def _refuse_unused(self) -> None:
        """Refuse a setting that the rule never reads: somebody forgot the rule."""
        for name, readers, reads in (
            ("votes", [Rule.at_least], self.rule is Rule.at_least),
            ("metric", [Rule.single], self.rule is Rule.single),
            ("tie_metric", [TieRule.metric], self.tie_rule is TieRule.metric),
            ("human_votes", COUNTING, self.rule in COUNTING),
            ("weights", WEIGHTED, self.rule in WEIGHTED),
        ):
            if getattr(self, name) and not reads:
                rule = "tie_rule" if name == "tie_metric" else "rule"
                raise ValueError(
                    f"vote.{name}={getattr(self, name)} has no meaning for "
                    f"vote.{rule}={getattr(self, rule).value}; it is read by "
                    f"{', '.join(reader.value for reader in readers)}: set vote.{rule}, or leave "
                    f"vote.{name} out"
                )

    def _check_weights(self) -> None:
        for name, weight in self.weights.items():
            if not (weight >= 1 and float(weight).is_integer()):
                raise ValueError(
                    f"vote.weights.{name}={weight:g}; a weight is a whole number of votes, at "
                    "least 1: for 1.5 against 1, write 3 and 2; who has none is left out of "
                    "panel.voters"
                )
        if HUMAN in self.weights and not self.human_votes:
            raise ValueError("vote.weights.human needs vote.human_votes=true")


@dataclass(kw_only=True, slots=True)
class LatentSpec:
    """VAE latents of the images for stage two, written in the scoring pass (docs/latents.md)."""

    write: bool = False
    """Whether to write them, for the VAE of `model.path` at `model.resolution`."""
    dtype: Dtype = Dtype.fp16
    """Format on disk. fp16 rounds by at most 2^-11 of a number, bf16 by 2^-8."""
    moments: bool = False
    """Keep mean and standard deviation, so that the trainer draws from the posterior as it does
    from images, in twice the space; else the mean, which the draws of SD's VAEs hardly leave."""
    flip: bool = False
    """Keep the mirrored images' latents, too, which train.flip needs, in twice the space."""
    compute: Dtype = Dtype.fp32
    """Format in which the VAE runs; fp32 whatever this is for SDXL's, unless its config says
    `force_upcast: false`."""
    batch: int = 8
    """Images per forward pass; halved when the device runs out of memory."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"label.latents.batch={self.batch}; it must be at least 1")


@dataclass(kw_only=True, slots=True)
class TextSpec:
    """Encoded prompts for stage two, written after the scores (docs/texts.md)."""

    write: bool = False
    """Whether to write them, for the text encoders of `model.path`."""
    dtype: Dtype = Dtype.bf16
    """Format on disk. bf16 rounds by at most 2^-8 of a number, fp16 by 2^-11."""
    compute: Dtype = Dtype.fp32
    """Format in which the text encoders run."""
    batch: int = 8
    """Prompts per forward pass; halved when the device runs out of memory."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"label.texts.batch={self.batch}; it must be at least 1")


@dataclass(kw_only=True, slots=True)
class LabelSpec:
    """How stage one runs; nothing here changes a label."""

    batch: int = 64
    """Images per forward pass, fewer for a set that has not so many in any file; halved when the
    device runs out of memory."""
    workers: int | None = None
    """Threads, or above 4 processes, that decode and resize images before the networks need them; 0
    decodes in the main thread, null takes a process's part of the machine's cores, at most 16."""
    cache_mb: int = 1024
    """Memory of each process for embeddings of images and prompts that may occur again, in MB:
    about 13 kB an image with the paper's four metrics."""
    compile: bool = False
    """Let torch compile the networks: a minute or more at the start, then often faster on a GPU.
    Scores change by rounding."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; with several processes a machine, each takes its own GPU."""
    inspect: bool = False
    """Only read the label set, print its statistics and write `labels/<vote>/report.html`."""
    gallery_pairs: int = 8
    """Pairs in each gallery of the report."""
    latents: LatentSpec = field(default_factory=LatentSpec)
    """The images' latents, beside the scores."""
    texts: TextSpec = field(default_factory=TextSpec)
    """The encoded prompts, beside the scores."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("workers", 0), ("cache_mb", 0), ("gallery_pairs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"label.{name}={getattr(self, name)}; it must be at least {least}")
        check_device("label.device", self.device)


@dataclass(kw_only=True, slots=True)
class ParitySpec:
    """How `make parity` checks the metrics; nothing here changes a score."""

    images: str = ""
    """A folder with images of the official repositories, at any depth (ImageReward's
    assets/images, HPSv2's demo_image.jpg, CLIP.png); empty checks no published score."""
    threshold: float | None = None
    """Difference of chances up to which Pick-a-Pic's accuracy calls a pair a tie; null chooses it
    on one half of the pairs for the other."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"parity.threshold={self.threshold}; it must be in [0, 1], or null")
