"""The processes of a run, and the collective operations between them.

They meet in the same way under `python -m train`, torchrun, srun and DeepSpeed's launcher, with
NCCL on GPUs and gloo on CPUs. Ending the others when one process dies is the launcher's work: see
docs/many-machines.md.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.devices import choose_device
from data.distributed import Rank, be_alone
from train.config import COLLECTIVE_TIMEOUT_S
from train.distributed.library import library
from train.distributed.malloc import keep_freed_memory


class LostContactError(ValueError):
    """A collective operation failed, usually because another process has ended."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of this run, as one of them sees them."""

    rank: int
    world_size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for every process."""
        on_gpu = self.device.type == "cuda"  # else NCCL guesses which one, and says so
        dist.barrier(device_ids=[self.device.index] if on_gpu else None)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; every process gets the sum."""
        dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every process's value on every process, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def start(device: str, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S) -> World:
    """Join the processes that the launcher started; without a launcher, be a world of one.

    A collective operation fails after `collective_timeout_s`.

    Raises:
        ValueError: `device` is unknown, or names a GPU that torch cannot use.
    """
    place = choose_device("train.device", device, Rank.from_environment())
    be_alone()
    if place.type == "cuda":
        os.environ["LOCAL_RANK"] = str(place.index)  # DeepSpeed takes its device from it
        prepare_gpu()
    else:
        _prepare_cpu()
    library().init_distributed(
        dist_backend="nccl" if place.type == "cuda" else "gloo",
        timeout=timedelta(seconds=collective_timeout_s),
        verbose=False,
    )
    return World(dist.get_rank(), dist.get_world_size(), place)


def prepare_gpu() -> None:
    """Compute attention by FlashAttention where cuDNN would be chosen.

    cuDNN's backward pass has ended a training of FLUX.1 by an illegal memory access (torch 2.11 on
    an H200), and gives NaN for some lengths (pytorch#196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _prepare_cpu() -> None:
    """Share this machine's cores out among its processes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // Rank.from_environment().local_world_size))


def stop() -> None:
    """Leave the process group. For success only: a process that fails must not wait for others."""
    dist.destroy_process_group()


def is_communication_error(error: RuntimeError) -> bool:
    """Whether a collective operation failed. NCCL's errors have a class, gloo's only a text."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
