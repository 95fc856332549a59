"""From settings to DeepSpeed's configuration."""

from typing import Any

from torch import nn

from train.config import Offload, OptimizerKind, Precision, TrainSpec
from train.distributed.world import World
from train.models.memory import BUCKET


def check_sums(spec: TrainSpec, world: World) -> None:
    """Refuse gradients of several micro-batches that would be added up in bf16.

    Raises:
        ValueError: ZeRO stage 0 would do so; says what to choose.
    """
    accumulation = _accumulation(spec, world)
    if spec.precision is not Precision.bf16 or spec.zero.stage or accumulation == 1:
        return
    other = "zero=stage1, which adds them up in fp32"
    if spec.optimizer.kind is OptimizerKind.adafactor:  # it runs with no other stage
        whole = spec.batch // world.world_size
        other = f"train.micro_batch={whole}, or optimizer=adamw with {other}"
    raise ValueError(
        f"zero=stage0 adds up bf16 gradients in bf16, and here {accumulation} micro-batches make a "
        f"step; choose {other}"
    )


def _accumulation(spec: TrainSpec, world: World) -> int:
    return spec.batch // (spec.micro_batch * world.world_size)


def zero_config(denoiser: nn.Module, spec: TrainSpec, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration of a run that `check_sums` accepts."""
    bf16 = spec.precision is Precision.bf16
    bucket = max(1, min(BUCKET, sum(parameter.numel() for parameter in denoiser.parameters())))
    return {
        "train_batch_size": spec.batch,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": _accumulation(spec, world),
        "gradient_clipping": spec.clip_norm or 0.0,
        "bf16": {"enabled": bf16},
        "communication_data_type": spec.reduce_dtype.value if bf16 else "fp32",
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and spec.zero.stage == 0 else "fp32"},
        "zero_optimization": {
            "stage": spec.zero.stage,
            "overlap_comm": overlaps(spec, world),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            **offloaded(spec, world),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler at run time
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a micro-batch
    }


def offloaded(spec: TrainSpec, world: World) -> dict[str, Any]:
    """DeepSpeed's settings of what is kept in the machine's memory."""
    place = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    parts = {
        Offload.none: (),
        Offload.optimizer: ("offload_optimizer",),
        Offload.parameters: ("offload_optimizer", "offload_param"),
    }
    return {part: dict(place) for part in parts[spec.zero.offload]}


def overlaps(spec: TrainSpec, world: World) -> bool:
    """Whether communication has a stream of its own: wanted, or by default where it pays.

    Under stage 3 parameters are gathered in every layer, and on the default stream the layers wait
    for them. Stages 1 and 2 gain less and need a second bucket.
    """
    if spec.overlap_comm is not None:
        return spec.overlap_comm
    return spec.zero.stage == 3 and world.device.type == "cuda"


def advice(spec: TrainSpec, world: World) -> str:
    """Say if another stage would be faster; empty if not."""
    if world.device.type != "cuda":
        return ""
    if spec.zero.stage == 3 and world.world_size == 1:
        return (
            "zero=stage3 on one GPU partitions nothing, and waits for the GPU at each fetch of "
            "parameters (2 to 3 times slower, estimated); take zero=stage2 if it fits"
        )
    if spec.zero.stage == 2 and spec.precision is Precision.bf16:
        return (
            "zero=stage2 handles each gradient by itself in every micro-batch (SDXL: 2.9 pairs/s "
            "on an H200, 5.2 with zero=stage1); take zero=stage1 if it fits"
        )
    return ""
