"""Which device a process takes, on machines with fake GPUs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.artifacts.config_diff import refuse_other_settings
from data.devices import choose_device, is_out_of_memory, means_gpu
from data.distributed import Rank, num_workers
from generate.sampler import sample_missing
from label.metrics.registry import score_settings, settle_dtypes
from label.scoring.batching import AsyncCopy, Batch, run_halving
from label.scoring.panel import Panel
from tests import helpers_label as tiny
from tests.test_conf import job
from train.distributed import world

CPU = torch.device("cpu")
Machine = Callable[[int, int], list[int]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretends that torch sees some GPUs and nvidia-smi lists some; notes which become current."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    current: list[int] = []

    def pretend(seen: int, listed: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        monkeypatch.setattr("data.devices.num_listed_gpus", lambda: listed)
        return current

    return pretend


@pytest.mark.parametrize(
    ("name", "local_rank", "index"), [("auto", 1, 1), ("cuda", 3, 3), ("cuda:2", 0, 2)]
)
def test_a_gpu_that_is_chosen_is_the_current_one(
    machine: Machine, name: str, local_rank: int, index: int
):
    """Else events and allocations that name no device belong to GPU 0 on every rank."""
    current = machine(4, 4)
    assert choose_device("label.device", name, Rank(local_rank, 4, local_rank, 4)) == torch.device(
        "cuda", index
    )
    assert current == [index]


def test_each_task_of_slurm_may_see_its_own_gpu_alone(machine: Machine):
    """`srun --gpus-per-task=1`: eight local ranks, and each sees one GPU, number 0."""
    current = machine(1, 1)
    assert choose_device("label.device", "auto", Rank(5, 8, 5, 8)) == torch.device("cuda", 0)
    assert current == [0]


def test_without_gpus_auto_means_the_cpu(machine: Machine):
    current = machine(0, 0)
    assert choose_device("label.device", "auto", Rank(local_rank=3)) == CPU
    assert choose_device("label.device", "cpu", Rank()) == CPU
    assert not current
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"evaluate.device={name} means GPU .* sees no GPU; "):
            choose_device("evaluate.device", name, Rank())


@pytest.mark.parametrize("setting", ["label.device", "train.device", "evaluate.device"])
def test_a_gpu_that_torch_cannot_use_is_no_reason_for_the_cpu(machine: Machine, setting: str):
    """An old driver, or a wheel for CPUs: a whole run on the CPU would be a surprise."""
    machine(0, 8)
    with pytest.raises(ValueError, match=f"{setting}=auto: nvidia-smi lists 8 GPUs, but torch"):
        choose_device(setting, "auto", Rank())
    assert choose_device(setting, "cpu", Rank()) == CPU


def test_gpus_that_are_hidden_on_purpose_are_not_missed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    machine(0, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("label.device", "auto", Rank()) == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # what a scheduler sets
    with pytest.raises(ValueError, match="nvidia-smi lists 8 GPUs"):
        choose_device("label.device", "auto", Rank())


def test_nvidia_smi_is_asked_as_make_asks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from data.devices import num_listed_gpus

    monkeypatch.setenv("PATH", str(tmp_path))
    assert num_listed_gpus() == 0
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: x)'\necho 'GPU 1: NVIDIA H100'\n")
    tool.chmod(0o755)
    assert num_listed_gpus() == 2
    tool.write_text("#!/bin/sh\necho 'No devices found.'\nexit 6\n")
    assert num_listed_gpus() == 0


def test_a_gpu_that_is_not_there_and_a_name_that_is_none(machine: Machine):
    machine(2, 2)
    with pytest.raises(ValueError, match="label.device=cuda:2 means GPU 2, but torch sees 2 GPUs"):
        choose_device("label.device", "cuda:2", Rank())
    with pytest.raises(ValueError, match="label.device='gpu'; allowed are auto, cpu, cuda, cuda:N"):
        choose_device("label.device", "gpu", Rank())


@pytest.mark.parametrize(
    ("name", "listed", "hidden", "expected"),
    [
        ("auto", 0, False, "fp32"),
        ("auto", 1, False, "fp16"),
        ("auto", 1, True, "fp32"),
        ("cpu", 1, False, "fp32"),
        ("cuda:1", 2, False, "fp16"),
    ],
)
def test_the_paper_panel_has_the_format_of_its_device(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, listed: int, hidden: bool,
    expected: str,
):  # fmt: skip
    machine(listed, listed)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    built = job("panel=paper", "metrics.pickscore.dtype=bf16")
    settled = settle_dtypes(built.metrics, on_gpu=means_gpu(name))
    formats = {metric: settled[metric].dtype.value for metric in built.panel.voters}
    assert formats.pop("pickscore") == "bf16"
    assert set(formats.values()) == {expected}


def test_scores_in_another_format_are_refused(tmp_path: Path):
    """What a GPU began in fp16 is not continued on a CPU in fp32 as if it were the same."""
    spec = replace(tiny.specs(tiny.build_weights(tmp_path / "weights"))["clip"], dtype=None)
    on_gpu, on_cpu = (
        score_settings(settle_dtypes({"clip": spec}, on_gpu=on_gpu))["clip"]
        for on_gpu in (True, False)
    )
    assert (on_gpu["dtype"], on_cpu["dtype"]) == ("fp16", "fp32")
    with pytest.raises(ValueError, match="dtype"):
        refuse_other_settings(tmp_path, on_gpu, on_cpu)
    assert Panel.load({"clip": spec}, CPU).metrics["clip"].resolved.dtype.value == "fp32"


def test_fp32_on_a_gpu_is_tf32(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    chosen: list[str] = []
    for gpus in (0, 1):
        machine(gpus, gpus)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
        choose_device("label.device", "auto", Rank())
        assert len(chosen) == gpus
    assert chosen == ["high"]


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(2, 1, 2), (2, 8, 1), (64, 4, 8), (16, 4, 4)]
)
def test_workers_follow_the_machine(
    cores: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert num_workers(None, Rank(0, processes, 0, processes)) == threads
    assert num_workers(3, Rank(0, processes, 0, processes)) == 3


def test_training_takes_its_gpu_in_the_same_place(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    """DeepSpeed reads LOCAL_RANK, so that it must be the number of the GPU."""
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    joined: dict[str, object] = {}

    class Library:
        @staticmethod
        def init_distributed(**options: object) -> None:
            joined.update(options)

    monkeypatch.setattr(world, "library", lambda: Library)
    monkeypatch.setattr(world.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(world.dist, "get_world_size", lambda: 8)
    current = machine(1, 1)
    assert world.start("auto").device == torch.device("cuda", 0)
    assert current == [0]
    assert joined["dist_backend"] == "nccl"
    assert world.os.environ["LOCAL_RANK"] == "0"


def test_a_copy_waits_for_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch):
    """Values on cuda:1 while cuda:0 is current: an event on cuda:0's stream waits for nothing."""

    class Values(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

        def to(self, *_: object, **__: object) -> torch.Tensor:
            return torch.ones(2)

    class Event:
        recorded: object = None
        synchronized = False

        def record(self, stream: object = None) -> None:
            Event.recorded = stream

        def synchronize(self) -> None:
            Event.synchronized = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    copy = AsyncCopy(torch.ones(2).as_subclass(Values))
    assert Event.recorded == "stream of cuda:1"
    np.testing.assert_array_equal(copy.wait(), np.ones(2))
    assert Event.synchronized


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[:40])
def test_every_way_of_running_out_of_memory_halves_the_batch(error: RuntimeError):
    assert is_out_of_memory(error)
    batch = Batch(4)

    def forward(images: np.ndarray) -> torch.Tensor:
        if len(images) > 2:
            raise error
        return torch.from_numpy(images)

    images = np.arange(5.0)
    np.testing.assert_array_equal(run_halving(forward, images, batch), images)
    assert batch.size == 2


def test_other_errors_of_a_device_end_the_run(tmp_path: Path):
    def forward(_: np.ndarray) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_halving(forward, np.zeros(2), Batch(2))

    class Broken:
        def sample(self, *_: object) -> np.ndarray:
            raise RuntimeError("CUDA error: device-side assert triggered")

    from generate.image_files import Sample
    from generate.prompts.prompt_set import Prompt

    sample = Sample("m", Prompt(0, "a cat"), 0, tmp_path / "x.png")
    with pytest.raises(RuntimeError, match="device-side assert"):
        sample_missing(Broken(), [sample], 2, lambda _: None)
