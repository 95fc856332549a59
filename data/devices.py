"""Number formats, the device of a process, and how a device runs out of memory, for every stage.

A GPU that is chosen becomes the current one: events, streams and allocations that name no device
then belong to it, on every rank.
"""

import os
import re
import shutil
import subprocess
from enum import Enum
from typing import TYPE_CHECKING

from data.distributed import Rank

if TYPE_CHECKING:
    import torch

NAMES = re.compile(r"auto|cpu|cuda(:\d+)?")
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES by which a user or Slurm hides every GPU."""
NVIDIA_SMI_S = 30.0
"""Longest wait for nvidia-smi, which is slow where its daemon does not run."""
NO_MEMORY = (
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)  # fmt: skip
"""What the libraries' errors say when the device's or the host's memory is full."""


class Dtype(Enum):
    """Number formats of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> "torch.dtype":
        """The format as torch names it; torch is imported here, so that settings stay light."""
        import torch

        return {
            Dtype.fp32: torch.float32,
            Dtype.bf16: torch.bfloat16,
            Dtype.fp16: torch.float16,
        }[self]


def check_device(setting: str, name: str) -> None:
    """Refuse an unknown device name.

    Raises:
        ValueError: Names `setting` and what is allowed.
    """
    if not NAMES.fullmatch(name):
        raise ValueError(f"{setting}={name!r}; allowed are auto, cpu, cuda, cuda:N")


def means_gpu(name: str) -> bool:
    """Whether a device's name will mean a GPU on this machine; asks without importing torch."""
    if name == "auto":
        return os.environ.get("CUDA_VISIBLE_DEVICES") not in HIDDEN and num_listed_gpus() > 0
    return name != "cpu"


def choose_device(setting: str, name: str, rank: Rank) -> "torch.device":
    """The device of this process; a GPU becomes the current one.

    `auto` and `cuda` give each process on a machine its own GPU. A scheduler may show each process
    its own GPU alone, so the local rank counts modulo the GPUs that are visible.

    Raises:
        ValueError: The name is unknown, names a GPU that is not there, or is `auto` on a machine
            whose GPUs torch cannot use.
    """
    import torch

    check_device(setting, name)
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and name == "auto":
        refuse_hidden_gpus(setting)
        return torch.device("cpu")
    index = int(name[5:]) if name.startswith("cuda:") else rank.local_rank % max(count, 1)
    if index >= count:
        raise ValueError(
            f"{setting}={name} means GPU {index}, but torch sees {count or 'no'} "
            f"GPU{'s' * (count > 1)}; set {setting}=auto or {setting}=cpu"
        )
    torch.cuda.set_device(index)
    # The one place that decides about TF32: fp32 products round as convolutions do by default, to
    # fp16's digits, in which most of a GPU's work is done; NVIDIA_TF32_OVERRIDE=0 is against it.
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", index)


def refuse_hidden_gpus(setting: str) -> None:
    """Refuse to fall back to the CPU where a GPU is there that torch cannot use.

    Raises:
        ValueError: nvidia-smi lists GPUs that nobody hid from this process.
    """
    import torch

    count = num_listed_gpus()
    if not count or os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return
    built = f"torch {torch.__version__} is built for " + (
        f"CUDA {torch.version.cuda}, which needs a newer driver" if torch.version.cuda else "CPUs"
    )
    raise ValueError(
        f"{setting}=auto: nvidia-smi lists {count} GPU{'s' * (count > 1)}, but torch can use none; "
        f"{built}: update the driver or install another torch, or set {setting}=cpu to run on the "
        "CPU all the same"
    )


def num_listed_gpus() -> int:
    """GPUs that the driver's own tool lists, as the Makefile counts them; 0 without the tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        answer = subprocess.run(
            [tool, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory, so that a smaller batch may succeed.

    torch's allocator has a class of its own for it. The driver, cuBLAS and cuDNN allocate besides
    it, and their failures are plain RuntimeErrors or AcceleratorErrors with a text.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy a tensor to the device; the host does not wait for a GPU."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already: no second copy
