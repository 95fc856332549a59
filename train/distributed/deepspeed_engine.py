"""A thin wrapper around DeepSpeed: the sharded policy and the sharded reference."""

import argparse
import contextlib
import io
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.distributed import MOST_WORKERS
from train.config import TrainSpec
from train.distributed.library import library, quiet
from train.distributed.optimizer import IN_8_BITS, make_optimizer
from train.distributed.world import World
from train.distributed.zero_config import zero_config

TAG = "engine"
"""DeepSpeed's folder inside a checkpoint."""
SPAWN_ABOVE = 1 << 30
"""Bytes of shards from which several processes merge them: each takes 10 s to start."""


class NonFiniteError(ValueError):
    """A gradient is inf or NaN; the weights are as they were before the step."""


# --- the policy ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MasterPart:
    """A part of a parameter's fp32 master weights, or of something that goes with them."""

    start: int
    """Its first element in the flat parameter."""
    values: Tensor
    """Flat, float32."""


class Policy:
    """The model in training: forward, backward, update, save, load."""

    def __init__(self, denoiser: nn.Module, spec: TrainSpec, world: World) -> None:
        self.trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        self.on_frozen_base = len(self.trained) < len(list(denoiser.parameters()))
        optimizer = make_optimizer(self.trained.values(), spec)
        config = zero_config(denoiser, spec, world)
        with quiet():
            self.engine = library().initialize(model=denoiser, optimizer=optimizer, config=config)[
                0
            ]
        add_gradients_at_once(self.engine.optimizer)
        self._optimizer = optimizer  # DeepSpeed puts its fp32 partitions in the parameters' place
        self.engine.module.eval()  # with dropout, policy and reference would differ
        self.sharded = spec.zero.stage == 3
        self.in_8_bits = spec.optimizer.kind in IN_8_BITS
        self.unguarded = self.engine.optimizer is optimizer  # stage 0, fp32

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.engine.zero_optimization_stage())

    @property
    def module(self) -> nn.Module:
        """The denoiser; under stage 3 its parameters are only partly here."""
        module: nn.Module = self.engine.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward pass."""
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss."""
        self.engine.backward(loss)

    def next_micro_batch(self) -> None:
        """Move on to the next micro-batch of the same step."""
        self.engine.step()

    def optimizer_step(self, lr: float) -> float:
        """Apply the gradients of all micro-batches; return their norm before clipping.

        Raises:
            NonFiniteError: The norm is inf or NaN; nothing was changed.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._own_norm() if self.unguarded else None
        if norm is not None and not norm.isfinite():
            raise NonFiniteError(f"the gradient norm is {norm.item()}")
        self.engine.step()
        if (
            not self.engine.was_step_applied()
        ):  # DeepSpeed skips a step silently when it sees inf or NaN
            raise NonFiniteError("the gradient norm is not finite")
        return float(norm if norm is not None else self.engine.get_global_grad_norm())

    def _own_norm(self) -> Tensor:
        """The gradient norm under stage 0 in fp32, where DeepSpeed does not check gradients."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def save(self, folder: Path) -> None:
        """Write this rank's shards into a folder; every rank must call it.

        Frozen weights are the base model's and are not written.
        """
        with quiet():
            self.engine.save_checkpoint(
                str(folder),
                tag=TAG,
                save_latest=False,
                exclude_frozen_parameters=self.on_frozen_base,
            )

    def load(self, folder: Path) -> None:
        """Read shards written by the same number of ranks. It unpickles: check hashes first."""
        with quiet():
            path, _ = self.engine.load_checkpoint(
                str(folder), tag=TAG, load_module_strict=not self.on_frozen_base
            )
        assert path is not None, f"DeepSpeed found nothing in {folder}"

    def load_from_other_ranks(self, folder: Path, scratch: Path) -> None:
        """Read shards that another number of ranks wrote, by way of DeepSpeed's universal format.

        Rank 0 converts them to a file for each parameter in `scratch`, which is removed at the end.
        """
        if self.stage == 0:  # every rank has everything
            self.load(folder)
            return
        if self.in_8_bits:
            raise ValueError(
                f"{folder} has an optimizer in 8 bits, whose blocks no other number of processes "
                "can share; resume with as many processes as before"
            )
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            to_universal(folder / TAG, scratch / TAG)
        dist.barrier()
        self.engine._config.load_universal_checkpoint = True
        try:
            self.load(scratch)
            separate_steps(self._optimizer)
        finally:
            self.engine._config.load_universal_checkpoint = False
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(scratch)

    def gather_fp32_state_dict(self) -> dict[str, Tensor]:
        """Gather the trained weights in fp32 on the CPU of rank 0; other ranks get an empty dict.

        They are the optimizer's master weights: in bf16 the model computes with rounded copies.
        """
        local, weights = self._local_masters(), {}
        gather = library().utils.safe_get_full_fp32_param
        for name, parameter in self.trained.items():
            master = local[name] if local else gather(parameter)  # every rank must call it
            if dist.get_rank() == 0:
                weights[name] = master.detach().to("cpu", torch.float32, copy=True)
        return weights

    def master_parts(self) -> dict[str, MasterPart]:
        """This rank's parts of the master weights, as views that a step changes.

        Under stage 0 each rank has all of each; under the others parameters of which it has nothing
        are left out.
        """
        if self.stage == 0:
            masters = self._local_masters().items()
            return {name: MasterPart(0, master.view(-1)) for name, master in masters}
        parts = {name: self._own_part(parameter) for name, parameter in self.trained.items()}
        return {name: part for name, part in parts.items() if part is not None}

    def _own_part(self, parameter: Any) -> MasterPart | None:
        """This rank's part of a master weight under stages 1 to 3, without padding."""
        if not self.sharded:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            return MasterPart(mapping.lp_fragment_address.start, mapping.get_hp_fragment())
        state = parameter._z3_optimizer
        values, _ = state._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        start = dist.get_rank() * len(values)
        values = values[: max(0, parameter.ds_numel - start)]
        return MasterPart(start, values) if len(values) else None

    def _local_masters(self) -> dict[str, Tensor]:
        """Master weights that this rank has whole: all under stage 0, none under the others."""
        if self.stage > 0:
            return {}
        if self.unguarded:
            return dict(self.trained)
        rounded, masters = (
            [parameter for group in groups for parameter in group]
            for groups in (self.engine.optimizer.fp16_groups, self.engine.optimizer.fp32_groups)
        )
        names = {parameter: name for name, parameter in self.trained.items()}
        return {
            names[parameter]: master for parameter, master in zip(rounded, masters, strict=True)
        }


def add_gradients_at_once(optimizer: Any) -> None:
    """Let DeepSpeed's bf16 optimizer of stage 1 add a micro-batch's gradients in one call.

    Its own loop runs some Python and two kernels for each parameter: 54 of SDXL's 411 ms a
    micro-batch on an H200, in which the GPU waits. The sums are the same.
    """
    if not hasattr(optimizer, "update_hp_grads") or optimizer.immediate_grad_update:
        return

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        for number, group in enumerate(optimizer.bf16_groups):
            sums = optimizer.fp32_groups_gradients[number]
            some = [index for index, weight in enumerate(group) if weight.grad is not None]
            if not some:
                continue
            new = [group[index].grad.view(sums[index].shape) for index in some]
            torch._foreach_add_([sums[index] for index in some], new)
            for index in some:
                group[index]._hp_grad = sums[index]
                optimizer.fp32_groups_has_gradients[number][index] = True
            if clear_lp_grads:
                torch._foreach_zero_(new)

    optimizer.update_hp_grads = update_hp_grads


def separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter its own step counter on its own device.

    DeepSpeed's universal format leaves them on the CPU, where the fused AdamW of a GPU cannot use
    them, and under stage 3 all parameters share one, which each of them would then increment.
    """
    for parameter, state in optimizer.state.items():
        if isinstance(step := state.get("step"), Tensor):
            state["step"] = step.detach().to(parameter.device, torch.float32, copy=True)


def to_universal(shards: Path, target: Path) -> None:
    """Convert a checkpoint's shards to DeepSpeed's universal format.

    A large one is merged by several processes. They are spawned: DeepSpeed would fork this one,
    whose threads and GPU a fork cannot use.
    """
    options = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(target),
        num_extract_workers=1,  # each holds a rank's whole shard
        num_merge_workers=num_merge_workers(shards),
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.checkpoint import ds_to_universal

        spawned = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
        vars(ds_to_universal)["ProcessPoolExecutor"] = spawned
        ds_to_universal.main(options)


def num_merge_workers(shards: Path) -> int:
    """Processes that merge a checkpoint's shards; a small one is done before they have started."""
    size = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    return min(MOST_WORKERS, len(os.sched_getaffinity(0))) if size > SPAWN_ABOVE else 1


# --- the reference, and parameters under stage 3 -------------------------------------------------


def sharded_reference(denoiser: nn.Module, spec: TrainSpec, world: World) -> Any:
    """A frozen denoiser whose parameters are partitioned over the ranks (stage 3, no optimizer)."""
    config = zero_config(denoiser, spec, world)
    with quiet():
        engine = library().initialize(model=denoiser.requires_grad_(False), config=config)[0]
    engine.module.eval()
    return engine


def release(engine: Any) -> None:
    """Drop gathered parameters, so that a rank keeps only its partition and nothing stale."""
    engine.optimizer.empty_partition_cache()


def partitions(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Each parameter's part on this rank, flattened: its stage 3 partition, else all of it."""
    return {
        name: parameter.ds_tensor.data
        if hasattr(parameter, "ds_tensor")
        else parameter.data.view(-1)
        for name, parameter in parameters.items()
    }


def shapes(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    """Each parameter's shape over all ranks."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}


def sizes(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Each parameter's number of elements over all ranks."""
    return {
        name: int(getattr(parameter, "ds_numel", parameter.numel()))
        for name, parameter in parameters.items()
    }
