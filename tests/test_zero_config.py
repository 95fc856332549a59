"""What DeepSpeed is told, and what is put right after it has loaded."""

import importlib.machinery
import sys
import types
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from train.config import (
    Offload,
    OptimizerKind,
    OptimizerSpec,
    Precision,
    TrainSpec,
    ZeroSpec,
)
from train.distributed.deepspeed_engine import add_gradients_at_once, separate_steps
from train.distributed.optimizer import check_optimizer, make_optimizer
from train.distributed.world import World, prepare_gpu
from train.distributed.zero_config import advice, check_sums, zero_config
from train.loader.device_copy import pin
from train.models.lora import factored

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config_of(
    device: torch.device = CPU, stage: int = 2, precision: str = "bf16", **more: object
) -> dict:
    spec = TrainSpec(
        batch=8, micro_batch=4, zero=ZeroSpec(stage=stage), precision=Precision(precision), **more
    )
    return zero_config(nn.Linear(2, 2), spec, World(0, 2, device))


def test_gradients_are_never_added_up_in_bf16():
    spec = TrainSpec(batch=8, micro_batch=2, zero=ZeroSpec(stage=0), precision=Precision.bf16)
    refused = r"2 micro-batches make a step; choose {}zero=stage1, which adds them up in fp32$"
    with pytest.raises(ValueError, match=refused.format("")):
        check_sums(spec, World(0, 2, GPU))
    adafactor = OptimizerSpec(kind=OptimizerKind.adafactor)
    whole = r"train\.micro_batch=4, or optimizer=adamw with "
    with pytest.raises(ValueError, match=refused.format(whole)):
        check_sums(replace(spec, optimizer=adafactor), World(0, 2, GPU))
    check_sums(replace(spec, micro_batch=4, optimizer=adafactor), World(0, 2, GPU))
    check_sums(replace(spec, precision=Precision.fp32), World(0, 2, GPU))


def test_no_timer_waits_for_the_device():
    """DeepSpeed's throughput timer is on by default, and synchronises twice a micro-batch."""
    from deepspeed.utils.config import get_timers_config

    assert not get_timers_config(config_of()).enabled


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_summed_across_processes_in_fp32(stage: int):
    assert config_of(stage=stage)["communication_data_type"] == "fp32"
    in_bf16 = config_of(stage=stage, reduce_dtype=Precision.bf16)
    assert in_bf16["communication_data_type"] == "bf16"
    in_fp32 = config_of(stage=stage, precision="fp32", reduce_dtype=Precision.bf16)
    assert in_fp32["communication_data_type"] == "fp32"


def test_communication_overlaps_where_parameters_are_gathered_on_gpus():
    def overlaps(device: torch.device, stage: int, **more: object) -> bool:
        return config_of(device, stage, **more)["zero_optimization"]["overlap_comm"]

    assert overlaps(GPU, 3)
    assert not overlaps(GPU, 2)
    assert not overlaps(CPU, 3)
    assert overlaps(GPU, 2, overlap_comm=True)
    assert not overlaps(GPU, 3, overlap_comm=False)


def test_stage_3_on_one_gpu_is_advised_against():
    spec = TrainSpec(zero=ZeroSpec(stage=3))
    assert "take zero=stage2" in advice(spec, World(0, 1, GPU))
    assert advice(spec, World(0, 2, GPU)) == advice(spec, World(0, 1, CPU)) == ""
    in_fp32 = TrainSpec(precision=Precision.fp32)
    assert advice(in_fp32, World(0, 1, GPU)) == ""
    in_bf16 = [TrainSpec(precision=Precision.bf16, zero=ZeroSpec(stage=n)) for n in (1, 2)]
    assert advice(in_bf16[0], World(0, 1, GPU)) == ""
    assert "take zero=stage1" in advice(in_bf16[1], World(0, 2, GPU))


def test_gradients_are_clipped_unless_null():
    assert config_of()["gradient_clipping"] == 1.0
    assert config_of(clip_norm=None)["gradient_clipping"] == 0.0
    with pytest.raises(ValueError, match=r"train\.clip_norm=0\.0; it must be above 0, or null"):
        TrainSpec(clip_norm=0.0)


def test_adamw_has_the_constants_of_the_settings():
    """Two steps by hand (Loshchilov and Hutter 2019, Algorithm 2), with a gradient of 2, then 1."""
    constants = OptimizerSpec(betas=[0.5, 0.75], epsilon=0.25, weight_decay=0.125)
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = make_optimizer([weight], TrainSpec(lr=0.5, optimizer=constants))
    expected, mean, square = 3.0, 0.0, 0.0
    for step, gradient in enumerate((2.0, 1.0), start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        mean, square = 0.5 * (mean + gradient), 0.75 * square + 0.25 * gradient**2
        root = (square / (1 - 0.75**step)) ** 0.5 + 0.25
        expected = expected * (1 - 0.5 * 0.125) - 0.5 * mean / (1 - 0.5**step) / root
        assert weight.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("constants", "says"),
    [
        ({"betas": [0.9]}, r"betas=\[0\.9\]; give two numbers in \[0, 1\)"),
        ({"betas": [0.9, 1.0]}, r"betas=\[0\.9, 1\.0\]; give two"),
        ({"epsilon": 0.0}, r"epsilon=0\.0; it must be above 0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1; it must not be negative"),
    ],
)
def test_constants_that_make_no_optimizer_are_refused(constants: dict, says: str):
    with pytest.raises(ValueError, match=rf"train\.optimizer\.{says}"):
        OptimizerSpec(**constants)


class Bits8(torch.optim.SGD):
    """What AdamW8bit is given."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, lr=options["lr"])
        self.options = options


def test_an_optimizer_of_8_bits_is_that_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    spec = TrainSpec(optimizer=OptimizerSpec(kind=OptimizerKind.paged_adamw8bit, betas=[0.8, 0.9]))
    with pytest.raises(ValueError, match=r"kind=paged_adamw8bit needs the package bitsandbytes"):
        check_optimizer(spec, World(0, 1, GPU))
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["bitsandbytes.optim"].PagedAdamW8bit = Bits8
    check_optimizer(spec, World(0, 1, GPU))
    optimizer = make_optimizer([nn.Parameter(torch.ones(1))], spec)
    assert isinstance(optimizer, Bits8)
    assert optimizer.options == {
        "lr": spec.lr, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.01
    }  # fmt: skip
    with pytest.raises(ValueError, match="takes its steps on a GPU, but train.device is cpu"):
        check_optimizer(spec, World(0, 1, CPU))
    spec.zero.offload = Offload.optimizer
    with pytest.raises(ValueError, match=r"train\.zero\.offload=optimizer; choose"):
        check_optimizer(spec, World(0, 1, GPU))


def test_adafactor_needs_whole_weights():
    adafactor = OptimizerSpec(kind=OptimizerKind.adafactor)
    with pytest.raises(ValueError, match=r"zero\.stage=2 cuts the weights.*choose zero=stage0"):
        check_optimizer(TrainSpec(optimizer=adafactor), World(0, 1, CPU))
    spec = TrainSpec(optimizer=adafactor, zero=ZeroSpec(stage=0))
    check_optimizer(spec, World(0, 1, CPU))
    weight = nn.Parameter(torch.ones(4, 6))
    assert isinstance(make_optimizer([weight], spec), torch.optim.Adafactor)
    assert factored(weight.shape) == 4 + 6
    assert factored(torch.Size([7])) == 7
    with pytest.raises(ValueError, match="have no meaning for train.optimizer.kind=adafactor"):
        OptimizerSpec(kind=OptimizerKind.adafactor, epsilon=1e-6)


def test_each_parameter_counts_its_own_steps_on_its_own_device():
    """As DeepSpeed's universal load leaves them: one tensor for all, on the CPU."""
    parameters = [nn.Parameter(torch.zeros(2, device="meta")), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.AdamW(parameters)
    shared = torch.tensor(4.0)
    for parameter in parameters:
        optimizer.state[parameter]["step"] = shared
    separate_steps(optimizer)
    elsewhere, here = (optimizer.state[parameter]["step"] for parameter in parameters)
    assert elsewhere.device.type == "meta"
    assert here.item() == 4
    assert here is not shared
    shared += 1
    assert here.item() == 4


@dataclass
class Halves:
    winner: torch.Tensor
    loser: torch.Tensor


def test_strided_halves_are_contiguous_before_they_are_pinned(monkeypatch: pytest.MonkeyPatch):
    """A copy of strided memory to a GPU goes through pageable memory, for which the host waits."""
    pinned: list[bool] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.is_contiguous())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    both = torch.arange(24).view(3, 2, 4)
    halves = pin(Halves(both[:, 0], both[:, 1]), GPU)
    assert pinned == [True, True]
    assert torch.equal(halves.loser, both[:, 1])


def test_attention_on_gpus_is_not_cudnns():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        prepare_gpu()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_gradients_that_are_added_at_once_are_those_of_deepspeeds_loop():
    """With a gradient that is missing, one that is channels-last, and several micro-batches."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    shapes = [(4, 3, 3, 3), (7,), (5, 2)]

    def stand_in() -> SimpleNamespace:
        return SimpleNamespace(
            immediate_grad_update=False,
            autoep_folding_tp_group=None,
            bf16_groups=[
                [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
            ],
            fp32_groups_gradients=[[torch.zeros(shape) for shape in shapes]],
            fp32_groups_has_gradients=[[False] * len(shapes)],
        )

    theirs, ours = stand_in(), stand_in()
    theirs._update_hp_grad = partial(BF16_Optimizer._update_hp_grad, theirs)
    ours.update_hp_grads = None
    add_gradients_at_once(ours)
    random = torch.Generator().manual_seed(0)
    for missing in (1, None):
        new = [torch.randn(shape, generator=random).bfloat16() for shape in shapes]
        new[0] = new[0].contiguous(memory_format=torch.channels_last)
        for optimizer in (theirs, ours):
            for index, weight in enumerate(optimizer.bf16_groups[0]):
                weight.grad = None if index == missing else new[index].clone()
        BF16_Optimizer.update_hp_grads(theirs, clear_lp_grads=True)
        ours.update_hp_grads(clear_lp_grads=True)
        for one, two in zip(
            theirs.fp32_groups_gradients[0], ours.fp32_groups_gradients[0], strict=True
        ):
            assert torch.equal(one, two)
        assert theirs.fp32_groups_has_gradients == ours.fp32_groups_has_gradients
        assert not any(w.grad.any() for w in ours.bf16_groups[0] if w.grad is not None)
    assert ours.fp32_groups_gradients[0][1].any()
