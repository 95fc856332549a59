"""DeepSpeed behind a small door: processes, the sharded policy, the sharded reference.

The only file with deepspeed. It runs alike under `python -m train`, torchrun, srun and DeepSpeed's
launcher, on GPUs with NCCL and on CPUs with gloo.
"""

import argparse
import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.distributed import Rank, be_alone
from train.config import PATIENCE_S, Precision, TrainSpec
from train.distributed.malloc import keep_freed_memory
from train.models.memory import BUCKET

TAG = "engine"
"""DeepSpeed's folder inside a checkpoint."""


class NonFiniteError(ValueError):
    """A gradient is inf or NaN; the weights are as they were before the step."""


# --- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """The processes of this run, as one of them sees them."""

    rank: int
    size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for every process."""
        dist.barrier()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, everywhere; changes `tensor`."""
        dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """What the first process has, everywhere."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def all_gather(self, value: Any) -> list[Any]:
        """What every process has, everywhere, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start(device: str, patience_s: float = PATIENCE_S) -> World:
    """Join the processes that the launcher started; alone, be a world of one.

    One that waits for the others longer than `patience_s` fails.

    Raises:
        ValueError: A GPU is asked for where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"train.device={device}; allowed are auto, cpu and cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but no GPU is visible; set train.device=cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    be_alone()
    here = Rank.from_environment()
    local = here.local_rank
    if on_gpu:
        local %= torch.cuda.device_count()  # a scheduler may show each process its own GPU alone
        os.environ["LOCAL_RANK"] = str(local)
        torch.cuda.set_device(local)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // here.local_world_size))
    library().init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=patience_s),
        verbose=False,
    )
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), place)


def stop() -> None:
    """Leave; only after success, for a failing process must not wait for the others."""
    dist.destroy_process_group()


def library() -> Any:
    """The library, imported without the lines it prints and without anything it would compile."""
    for name in ("torch.utils.cpp_extension", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with quiet():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory collective is compiled at run time; a compiler that is killed leaves a lock
    # behind, and every later run waits on it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints and warns while it starts, saves and loads; none of it is for users."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the policy ----------------------------------------------------------------------------------


class Policy:
    """The model in training: forward, backward, update, save, load."""

    def __init__(self, unet: nn.Module, spec: TrainSpec, world: World) -> None:
        self.trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        self.on_frozen_base = len(self.trained) < len(list(unet.parameters()))
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True
        )
        config = _config(unet, spec, world.size)
        with quiet():
            self.engine = library().initialize(model=unet, optimizer=optimizer, config=config)[0]
        self.engine.module.eval()  # dropout would set policy and reference apart
        self.sharded = spec.zero.stage == 3
        self.unguarded = self.engine.optimizer is optimizer  # stage 0, fp32

    @property
    def module(self) -> nn.Module:
        """The UNet; under stage 3 its parameters are only partly here."""
        module: nn.Module = self.engine.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet's forward pass."""
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss."""
        self.engine.backward(loss)

    def next_micro_batch(self) -> None:
        """Go on to another micro-batch of the same step."""
        self.engine.step()

    def optimizer_step(self, lr: float) -> float:
        """The optimizer step on the gradients of all micro-batches; their norm before clipping.

        Raises:
            NonFiniteError: The norm is inf or NaN; nothing was changed.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._own_norm() if self.unguarded else None
        if norm is not None and not norm.isfinite():
            raise NonFiniteError(f"the gradient norm is {norm.item()}")
        self.engine.step()
        if not self.engine.was_step_applied():  # DeepSpeed has found inf or NaN, and says nothing
            raise NonFiniteError("the gradient norm is not finite")
        return float(norm if norm is not None else self.engine.get_global_grad_norm())

    def _own_norm(self) -> Tensor:
        """Under stage 0 with fp32 nobody else looks at the gradients before they are applied."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def save(self, folder: Path) -> None:
        """Write this rank's shards below a folder; every rank must call it.

        Frozen weights are the base's, and are not written.
        """
        with quiet():
            self.engine.save_checkpoint(
                str(folder),
                tag=TAG,
                save_latest=False,
                exclude_frozen_parameters=self.on_frozen_base,
            )

    def load(self, folder: Path) -> None:
        """Read shards written by as many ranks; it unpickles, so check their hashes first."""
        with quiet():
            path, _ = self.engine.load_checkpoint(
                str(folder), tag=TAG, load_module_strict=not self.on_frozen_base
            )
        assert path is not None, f"DeepSpeed found nothing in {folder}"

    def load_from_other_ranks(self, folder: Path, scratch: Path) -> None:
        """Read shards that were written by another number of ranks (DeepSpeed's universal form).

        `scratch` is where rank 0 spreads them out, one file a parameter; it is removed afterwards.
        """
        if self.engine.zero_optimization_stage() == 0:  # every rank holds everything
            self.load(folder)
            return
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            _spread(folder / TAG, scratch / TAG)
        dist.barrier()
        self.engine._config.load_universal_checkpoint = True
        try:
            self.load(scratch)
        finally:
            self.engine._config.load_universal_checkpoint = False
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(scratch)

    def gather_fp32_state_dict(self) -> dict[str, Tensor]:
        """The trained weights in fp32 on the CPU of rank 0, gathered one by one; empty elsewhere.

        They are the optimizer's: in bf16 the model computes with them rounded.
        """
        here, found = self._masters_here(), {}
        gathered = library().utils.safe_get_full_fp32_param
        for name, parameter in self.trained.items():
            master = here[name] if here else gathered(parameter)  # which all ranks must do
            if dist.get_rank() == 0:
                found[name] = master.detach().to("cpu", torch.float32, copy=True)
        return found

    def _masters_here(self) -> dict[str, Tensor]:
        """Under stage 0 every rank holds all that the optimizer updates; under others, none."""
        if self.engine.zero_optimization_stage() > 0:
            return {}
        if self.unguarded:
            return dict(self.trained)
        rounded, masters = (
            [parameter for group in groups for parameter in group]
            for groups in (self.engine.optimizer.fp16_groups, self.engine.optimizer.fp32_groups)
        )
        names = {parameter: name for name, parameter in self.trained.items()}
        return {names[one]: master for one, master in zip(rounded, masters, strict=True)}


def _spread(shards: Path, target: Path) -> None:
    """Turn a checkpoint's shards into DeepSpeed's universal form."""
    options = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.checkpoint import ds_to_universal

        ds_to_universal.main(options)


def _config(unet: nn.Module, spec: TrainSpec, world: int) -> dict[str, Any]:
    bf16 = spec.precision is Precision.bf16
    accumulation = spec.batch // (spec.micro_batch * world)
    if bf16 and spec.zero.stage == 0 and accumulation > 1:
        raise ValueError(
            f"zero=stage0 adds up bf16 gradients in bf16, and here {accumulation} micro-batches "
            "make a step; choose zero=stage1, which adds them up in fp32"
        )
    bucket = max(1, min(BUCKET, sum(parameter.numel() for parameter in unet.parameters())))
    return {
        "train_batch_size": spec.batch,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": spec.clip_norm,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and spec.zero.stage == 0 else "fp32"},
        "zero_optimization": {
            "stage": spec.zero.stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler at run time
        "steps_per_print": None,
    }


# --- the reference, and parameters under stage 3 -------------------------------------------------


def sharded_reference(unet: nn.Module, spec: TrainSpec, world: World) -> Any:
    """A frozen UNet whose parameters are shared out among the ranks (stage 3, no optimizer)."""
    config = _config(unet, spec, world.size)
    with quiet():
        engine = library().initialize(model=unet.requires_grad_(False), config=config)[0]
    engine.module.eval()
    return engine


def release(engine: Any) -> None:
    """Drop gathered parameters, so that what a rank keeps is its partition and nothing stale."""
    engine.optimizer.empty_partition_cache()


def partitions(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Each parameter's part on this rank, flat: its stage 3 partition, else all of it."""
    return {
        name: parameter.ds_tensor.data
        if hasattr(parameter, "ds_tensor")
        else parameter.data.view(-1)
        for name, parameter in parameters.items()
    }


def sizes(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Each parameter's number of elements over all ranks."""
    return {
        name: int(getattr(parameter, "ds_numel", parameter.numel()))
        for name, parameter in parameters.items()
    }
