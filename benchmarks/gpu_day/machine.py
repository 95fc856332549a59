"""What the figures were measured on: the device, its driver, the versions, and the code."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data.artifacts.atomic import write_json
from data.artifacts.manifest import code_revision

ROOT = Path(__file__).parents[2]
SOURCES = ("benchmarks", "conf", "data", "evaluate", "generate", "label", "tests", "train")
PACKAGES = ("torch", "transformers", "diffusers", "deepspeed", "open_clip_torch", "peft",
            "accelerate", "polars", "pyarrow", "numpy", "pillow")  # fmt: skip


def write_facts(path: Path, *, dry: bool) -> None:
    """Write `facts` to a file; called in a process of its own, since it takes hold of the GPU."""
    if dry:
        hide_gpus()
    write_json(path, facts())


def hide_gpus() -> None:
    """Make this process compute on the CPU; before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def compile_nothing() -> None:
    """Make torch.compile a formality: a CPU's kernels are others than a GPU's, and take minutes."""
    import torch

    torch.compiler.set_stance("force_eager")


def facts() -> dict[str, Any]:
    """The machine's facts; `device` is None where torch sees no GPU."""
    import torch

    gpu, memory = None, None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu, memory = properties.name, properties.total_memory / 2**30
    return {
        "device": gpu,
        "device_memory_gib": memory,
        "gpus": torch.cuda.device_count() if gpu else 0,
        "driver": driver() if gpu else None,
        "cuda": torch.version.cuda,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | versions(),
        "commit": code_revision(),
        "code": code_digest(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def driver() -> str | None:
    """The NVIDIA driver's version; None where neither its tool nor its file is there."""
    if tool := shutil.which("nvidia-smi"):
        ask = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=30)
        if lines := answer.stdout.split():
            return lines[0]
    file = Path("/proc/driver/nvidia/version")
    number = re.search(r"\d+\.\d+(?:\.\d+)?", file.read_text()) if file.is_file() else None
    return number[0] if number else None


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """The versions of the libraries that are installed."""
    known = {}
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def code_digest() -> str:
    """A hash of the sources, which names them also where there is no git or files have changed."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def slug(device: str) -> str:
    """A device's name in a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
