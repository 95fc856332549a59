"""Memory of a process in training, computed from numbers of parameters.

It counts the tensors that live from one step to the next, at their most: when the gradients of a
whole batch are there. It does not count activations, which depend on resolution, micro-batch and
kernels, nor what lives for a moment: a bucket in flight, a gathered layer, the allocator's slack.

`python -m train.models.memory` prints the published models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from train.config import Objective, Precision, Refresh, TrainSpec

BUCKET = 50_000_000
"""Elements of a communication bucket, at most; DeepSpeed's default would take 4 GB on any model."""

FP32 = 4
"""Bytes of a master weight, of either of Adam's moments, and of an accumulated gradient."""

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """How many parameters a model has."""

    denoiser: int
    """Parameters of the base's UNet or transformer."""
    adapter: int = 0
    """Parameters of a LoRA adapter; 0 trains the denoiser."""
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
}
"""With T5, where the family has it."""
ADAPTERS = {
    "SD1.5": 3_188_736, "SD2.1": 3_319_808, "SDXL": 23_224_320, "SD3.5 medium": 9_388_032,
    "SD3.5 large": 23_580_672, "FLUX.1 dev": 44_826_624,
}  # fmt: skip
"""LoRA of rank 16 on the layers that the family adapts by default."""
FP32_VAES = ("SDXL", "SD3.5 medium", "SD3.5 large")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one process, by what they are for."""

    policy: int
    """Weights that compute; with LoRA the frozen base and the adapter."""
    gradients: int
    optimizer: int
    """AdamW's two moments, the policy's average (`train.ema`), and the master weights where they
    are not the policy's own."""
    reference: int
    others: int
    """VAE and text encoders."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, item.name) for item in fields(self))

    def __str__(self) -> str:
        """Describe the parts in GiB."""
        each = ", ".join(
            f"{item.name} {getattr(self, item.name) / GIB:.2f}" for item in fields(self)
        )
        return f"{self.total / GIB:.2f} GiB a process without activations, counted ({each})"


def estimate_memory(
    counts: ParameterCounts, spec: TrainSpec, world_size: int, *, vae_in_fp32: bool = False
) -> MemoryEstimate:
    """Estimate the memory of one of `world_size` processes."""
    width = FP32 if spec.precision is Precision.fp32 else 2
    partitions = world_size if spec.zero.stage == 3 else 1
    weights = counts.denoiser + counts.adapter
    return MemoryEstimate(
        policy=width * weights // partitions,
        gradients=_gradients(counts, spec, world_size, width),
        optimizer=_optimizer(counts.trained, spec, world_size),
        reference=_reference(counts, spec, width) // partitions,
        others=width * counts.text + (FP32 if vae_in_fp32 else width) * counts.vae,
    )


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


def _optimizer(trained: int, spec: TrainSpec, world_size: int) -> int:
    moments, masters = (3 if spec.ema else 2) * FP32 * trained, FP32 * trained
    if spec.zero.stage == 0:
        return moments + (0 if spec.precision is Precision.fp32 else masters)
    return (moments + masters) // world_size


def _reference(counts: ParameterCounts, spec: TrainSpec, width: int) -> int:
    """Bytes of the reference over all processes, if it is partitioned."""
    refresh = spec.reference.refresh
    if spec.objective.kind is Objective.mapo or (counts.adapter and spec.reference_is_base):
        return 0  # there is none, or it is the base
    in_fp32_too = refresh is Refresh.ema and spec.precision is not Precision.fp32
    return (width + (FP32 if in_fp32_too else 0)) * counts.trained


# --- the published models ------------------------------------------------------------------------


def published_rows() -> Iterator[tuple[str, str, MemoryEstimate]]:
    """Yield model, training and memory; always in bf16 with a snapshot reference."""
    for name, whole in PUBLISHED.items():
        lora = ParameterCounts(
            denoiser=whole.denoiser, adapter=ADAPTERS[name], text=whole.text, vae=whole.vae
        )
        for stage, world_size in ((2, 1), (1, 8), (2, 8), (3, 8)):
            spec = TrainSpec()
            spec.zero.stage = stage
            how = f"all weights, ZeRO-{stage}, {world_size} GPU{'s' if world_size > 1 else ''}"
            yield name, how, estimate_memory(whole, spec, world_size, vae_in_fp32=name in FP32_VAES)
        spec = TrainSpec()
        yield (
            name,
            "LoRA of rank 16, 1 GPU",
            estimate_memory(lora, spec, 1, vae_in_fp32=name in FP32_VAES),
        )


def published_table() -> str:
    """Format `published_rows` as a Markdown table in GiB."""
    names = [item.name for item in fields(MemoryEstimate)]
    lines = [f"| model | trained | total | {' | '.join(names)} |", "|---|---" + "|---:" * 6 + "|"]
    for model, how, memory in published_rows():
        each = " | ".join(f"{getattr(memory, name) / GIB:.2f}" for name in names)
        lines.append(f"| {model} | {how} | {memory.total / GIB:.1f} | {each} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(published_table())
