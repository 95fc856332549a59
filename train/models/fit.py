"""Whether a run can fit its GPU, before any weight is loaded."""

from dataclasses import replace

import torch

from data.models.family import ModelError
from train.config import ModelSpec, OptimizerKind, Quantize, TrainSpec
from train.models.base_model import BaseModel
from train.models.components import empty_denoiser
from train.models.lora import attach, counts
from train.models.memory import GIB, QUANTIZED_BYTES, ParameterCounts, estimate_memory


def gpu_bytes(device: torch.device) -> int | None:
    """All memory of a GPU; None of another device."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def check_fits(
    base: BaseModel, model: ModelSpec, spec: TrainSpec, world_size: int, available: int
) -> None:
    """Refuse a run whose denoiser, gradients and optimizer alone exceed a GPU of this many bytes.

    Raises:
        ModelError: Says how much is counted, and what takes less.
    """
    memory = estimate_memory(count_parameters(base, model.quantize, spec), spec, world_size)
    if spec.optimizer.kind is OptimizerKind.paged_adamw8bit:
        memory = replace(memory, optimizer=0)  # it moves to the machine's memory
    if memory.total > available:
        raise ModelError(
            f"this run takes {memory}, but the GPU has {available / GIB:.1f} GiB; take a preset "
            "for it (+preset=24gb, see docs/models.md), tuning=lora, model.quantize=int8, "
            "zero=stage2 with train.zero.offload=optimizer, or more GPUs"
        )


def count_parameters(base: BaseModel, kind: Quantize, spec: TrainSpec) -> ParameterCounts:
    """Count the parameters of a denoiser and its adapter, on the meta device."""
    denoiser = empty_denoiser(base)
    linear = (layer for layer in denoiser.modules() if isinstance(layer, torch.nn.Linear))
    quantized = sum(layer.weight.numel() for layer in linear)
    if spec.lora.rank:
        lora = replace(spec.lora, targets=spec.lora.targets or list(base.family.lora_targets))
        attach(denoiser, lora, seed=0, with_reference=False)
    whole = counts(denoiser)
    if kind is Quantize.none:
        return whole
    size = int(QUANTIZED_BYTES[kind] * quantized)
    return replace(whole, quantized=quantized, quantized_bytes=size)
