"""Memory of a process in training, computed from numbers of parameters.

It counts the tensors that live from one step to the next, at their most: when the gradients of a
whole batch are there. It does not count activations, which depend on resolution, micro-batch and
kernels, nor what lives for a moment: a bucket in flight, a gathered layer, the allocator's slack.

`python -m train.models.memory` prints the published models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from train.config import (
    Objective,
    Offload,
    OptimizerKind,
    Precision,
    Quantize,
    Refresh,
    TrainSpec,
    ZeroSpec,
)

BUCKET = 50_000_000
"""Elements of a communication bucket, at most; DeepSpeed's default would take 4 GB on any model."""

FP32 = 4
"""Bytes of a master weight, of either of Adam's moments, and of an accumulated gradient."""

BLOCK_OF_8_BITS = 256
"""Numbers that share a scale in an optimizer of 8 bits."""

OFFLOADED = {
    Offload.optimizer: ("optimizer",),
    Offload.parameters: ("policy", "optimizer", "reference"),
}
"""The parts that lie in the machine's memory, besides gradients."""

QUANTIZED_BYTES = {Quantize.int8: 1.0, Quantize.nf4: 1 / 2 + 1 / 64 + FP32 / (64 * 256)}
"""Bytes of a weight in fewer bits: of nf4 with a scale of 8 bits for each block of 64, and one in
fp32 for 256 of those. The units of int8's rows are left out, below 1 % of the published models."""

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """How many parameters a model has."""

    denoiser: int
    """Parameters of the base's UNet or transformer."""
    adapter: int = 0
    """Parameters of a LoRA adapter; 0 trains the denoiser."""
    factored: int = 0
    """Sums over rows and columns that Adafactor keeps of the trained parameters."""
    quantized: int = 0
    """Parameters of the base that are stored in fewer bits (`model.quantize`)."""
    quantized_bytes: int = 0
    """What they take."""
    text: int = 0
    """Parameters of all text encoders."""
    vae: int = 0

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.adapter or self.denoiser


PUBLISHED = {
    "SD1.5": ParameterCounts(denoiser=859_520_964, text=123_060_480, vae=83_653_863),
    "SD2.1": ParameterCounts(denoiser=865_910_724, text=340_387_840, vae=83_653_863),
    "SDXL": ParameterCounts(denoiser=2_567_463_684, text=817_720_320, vae=83_653_863),
    "SD3.5 medium": ParameterCounts(denoiser=2_243_171_520, text=5_580_620_800, vae=83_819_683),
    "SD3.5 large": ParameterCounts(denoiser=8_056_627_520, text=5_580_620_800, vae=83_819_683),
    "FLUX.1 dev": ParameterCounts(denoiser=11_901_408_320, text=4_885_371_136, vae=83_819_683),
    "Z-Image": ParameterCounts(denoiser=6_154_908_736, text=4_022_468_096, vae=83_819_683),
    "Sana 1.6B": ParameterCounts(denoiser=1_604_462_752, text=2_614_341_888, vae=312_250_275),
    "Qwen-Image": ParameterCounts(denoiser=20_430_401_088, text=8_292_166_656, vae=126_892_531),
}
"""With T5, where the family has it."""
ADAPTERS = {
    "SD1.5": 3_188_736, "SD2.1": 3_319_808, "SDXL": 23_224_320, "SD3.5 medium": 9_388_032,
    "SD3.5 large": 23_580_672, "FLUX.1 dev": 44_826_624, "Z-Image": 16_711_680,
    "Sana 1.6B": 8_601_600, "Qwen-Image": 23_592_960,
}  # fmt: skip
"""LoRA of rank 16 on the layers that the family adapts by default."""
LINEAR = {
    "SD1.5": 270_049_280, "SD2.1": 301_219_840, "SDXL": 2_232_647_680,
    "SD3.5 medium": 2_241_822_720, "SD3.5 large": 8_053_694_464, "FLUX.1 dev": 11_898_322_944,
    "Z-Image": 6_153_863_168, "Sana 1.6B": 848_762_880, "Qwen-Image": 20_424_818_688,
}  # fmt: skip
"""Weights of the denoiser's linear layers: what `model.quantize` stores in fewer bits."""
FP32_VAES = ("SDXL", "SD3.5 medium", "SD3.5 large", "Sana 1.6B")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one process, by what they are for."""

    policy: int
    """Weights that compute; with LoRA the frozen base and the adapter."""
    gradients: int
    optimizer: int
    """The optimizer's averages, the policy's (`train.ema`), and the master weights where they are
    not the policy's own."""
    reference: int
    others: int
    """VAE and text encoders."""
    offloaded: int = 0
    """What lies in the machine's memory instead, and is no part of the total."""

    @property
    def total(self) -> int:
        """The sum of all parts that are not offloaded."""
        return sum(getattr(self, name) for name in PARTS)

    def __str__(self) -> str:
        """Describe the parts in GiB."""
        each = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in PARTS)
        text = f"{self.total / GIB:.2f} GiB a process without activations, counted ({each})"
        if not self.offloaded:
            return text
        return f"{text}, and {self.offloaded / GIB:.2f} GiB of the machine's memory"


PARTS = tuple(item.name for item in fields(MemoryEstimate) if item.name != "offloaded")
"""What a process holds on its device."""


def estimate_memory(
    counts: ParameterCounts, spec: TrainSpec, world_size: int, *, vae_in_fp32: bool = False
) -> MemoryEstimate:
    """Estimate the memory of one of `world_size` processes."""
    width = FP32 if spec.precision is Precision.fp32 else 2
    partitions = world_size if spec.zero.stage == 3 else 1
    weights = counts.denoiser - counts.quantized + counts.adapter
    whole = MemoryEstimate(
        policy=(width * weights + counts.quantized_bytes) // partitions,
        gradients=_gradients(counts, spec, world_size, width),
        optimizer=_optimizer(counts, spec, world_size),
        reference=_reference(counts, spec, width) // partitions,
        others=width * counts.text + (FP32 if vae_in_fp32 else width) * counts.vae,
    )
    if spec.zero.offload is Offload.none:
        return whole
    moved, part = OFFLOADED[spec.zero.offload], counts.trained // world_size
    size = sum(getattr(whole, name) for name in moved)
    size += 2 * FP32 * part  # gradients as they are summed, and as the step takes them
    if spec.zero.stage == 2:  # weights on their way back
        size += width * part
    left = whole.gradients - FP32 * part
    return replace(whole, **dict.fromkeys(moved, 0), gradients=left, offloaded=size)


def _gradients(counts: ParameterCounts, spec: TrainSpec, world_size: int, width: int) -> int:
    trained, stage = counts.trained, spec.zero.stage
    if stage == 0:
        return width * trained
    if stage == 1:  # whole on every process: those of a micro-batch, and their sum
        return (FP32 + width) * trained
    if stage == 2:
        return FP32 * trained // world_size
    bucket = min(BUCKET, counts.denoiser + counts.adapter)  # stage 3 keeps its bucket
    summed = FP32 if spec.reduce_dtype is Precision.fp32 else width  # the bucket's format
    return FP32 * trained // world_size + summed * bucket


def _optimizer(counts: ParameterCounts, spec: TrainSpec, world_size: int) -> int:
    trained, kind = counts.trained, spec.optimizer.kind
    moments, masters = 2 * FP32 * trained, FP32 * trained
    if kind is OptimizerKind.adafactor:
        moments = FP32 * counts.factored
    elif kind is not OptimizerKind.adamw:  # a byte each, and an fp32 scale for a block
        moments = 2 * (trained + FP32 * trained // BLOCK_OF_8_BITS)
    averages = moments + (FP32 * trained if spec.ema else 0)
    if spec.zero.stage == 0:
        return averages + (0 if spec.precision is Precision.fp32 else masters)
    return (averages + masters) // world_size


def _reference(counts: ParameterCounts, spec: TrainSpec, width: int) -> int:
    """Bytes of the reference over all processes, if it is partitioned."""
    refresh = spec.reference.refresh
    if spec.objective.kind is Objective.mapo or (counts.adapter and spec.reference_is_base):
        return 0  # there is none, or it is the base
    in_fp32_too = refresh is Refresh.ema and spec.precision is not Precision.fp32
    return (width + (FP32 if in_fp32_too else 0)) * counts.trained


# --- the published models ------------------------------------------------------------------------


def published(
    name: str, rank: int = 0, kind: Quantize = Quantize.none, **parts: int
) -> ParameterCounts:
    """The parameters of a published model with an adapter of this rank, on a base stored so.

    `parts` are counts to replace, as `text=0` where no text encoder is loaded.
    """
    counts = replace(PUBLISHED[name], adapter=ADAPTERS[name] * rank // 16, **parts)
    if kind is Quantize.none:
        return counts
    size = int(QUANTIZED_BYTES[kind] * LINEAR[name])
    return replace(counts, quantized=LINEAR[name], quantized_bytes=size)


def published_rows() -> Iterator[tuple[str, str, MemoryEstimate]]:
    """Yield model, training and memory; always in bf16 with a snapshot reference."""
    for name in PUBLISHED:
        in_fp32 = name in FP32_VAES
        for stage, world_size in ((2, 1), (1, 8), (2, 8), (3, 8)):
            spec = TrainSpec(zero=ZeroSpec(stage=stage))
            how = f"all weights, ZeRO-{stage}, {world_size} GPU{'s' if world_size > 1 else ''}"
            yield name, how, estimate_memory(published(name), spec, world_size, vae_in_fp32=in_fp32)
        for kind, base in ((Quantize.none, ""), (Quantize.nf4, " on nf4")):
            counts = published(name, 16, kind)
            memory = estimate_memory(counts, TrainSpec(), 1, vae_in_fp32=in_fp32)
            yield name, f"LoRA of rank 16{base}, 1 GPU", memory


def published_table() -> str:
    """Format `published_rows` as a Markdown table in GiB."""
    lines = [f"| model | trained | total | {' | '.join(PARTS)} |", "|---|---" + "|---:" * 6 + "|"]
    for model, how, memory in published_rows():
        each = " | ".join(f"{getattr(memory, name) / GIB:.2f}" for name in PARTS)
        lines.append(f"| {model} | {how} | {memory.total / GIB:.1f} | {each} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(published_table())
