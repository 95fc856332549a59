"""What is in a safetensors file, from its header: names, formats and shapes; reads no weight.

Nothing here imports torch.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from data.artifacts.readable import UnreadableError, check_readable, read_json_object

FLOATS = ("F64", "F32", "F16", "BF16")
"""Formats of weights that are read; FP8, INT8, ... need the library that quantised them."""
PROBE_BYTES = 4096
"""What is looked at first of a tensor that may hold nothing but zeros."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def is_floating(self) -> bool:
        """Whether it is of a format that weights are read in."""
        return self.dtype in FLOATS


def read_header(path: Path, *, zeros: bool = False) -> dict[str, TensorInfo]:
    """The tensors of a file that is whole; of an index, those of all its files.

    `zeros` allows matrices of nothing but zeros, as new adapters have. Elsewhere they come from
    downloads that reserved the file's size and were interrupted.

    Raises:
        UnreadableError: The file is missing, torn, a Git LFS pointer or no safetensors.
    """
    if path.name.endswith(".index.json"):
        parts = [read_header(part, zeros=zeros) for part in index_files(path)]
        return {name: tensor for part in parts for name, tensor in part.items()}
    header, data = _described(path)
    tensors = {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), path)
        for name, entry in header.items()
    }
    if not tensors:
        raise UnreadableError(f"{path} holds no tensors; fetch the file again")
    if not zeros and (empty := _all_zeros(path, header, data)):
        raise UnreadableError(
            f"{path} has nothing but zeros in {some(empty)}; its download was probably "
            "interrupted: fetch the file again"
        )
    return tensors


def index_files(index: Path) -> list[Path]:
    """The files that an index of several refers to; all of them are there.

    Raises:
        UnreadableError: The index is damaged, or one of its files is missing or cannot be read.
    """
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise UnreadableError(f"{index} has no weight_map that lists files; fetch it again")
    if not all(isinstance(name, str) for name in names.values()):
        raise UnreadableError(f"{index}: weight_map must give a file's name for each tensor")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        check_readable(file, f"{index.name} lists")
    return files


def _described(path: Path) -> tuple[dict[str, Any], int]:
    """The header without its metadata, and where the tensors' bytes begin."""
    check_readable(path)
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file's size
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (OSError, ValueError, SafetensorError) as error:
        raise UnreadableError(
            f"{path} is damaged, incomplete or no safetensors file ({error}); fetch it again"
        ) from error
    header.pop("__metadata__", None)
    return header, 8 + size


def _all_zeros(path: Path, header: Mapping[str, Any], data: int) -> list[str]:
    """Matrices and convolutions without a number other than 0; biases may be so."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        empty = []
        for name, entry in header.items():
            begin, end = (data + offset for offset in entry["data_offsets"])
            if len(entry["shape"]) < 2 or begin == end or name.endswith("position_ids"):
                continue
            probe = content[begin : min(end, begin + PROBE_BYTES)]
            if not probe.strip(b"\0") and not _any(content, begin, end):
                empty.append(name)
    return empty


def _any(content: mmap.mmap, begin: int, end: int) -> bool:
    step = 1 << 24
    return any(
        bool(np.frombuffer(content[at : min(end, at + step)], np.uint8).any())
        for at in range(begin, end, step)
    )


def some(names: list[str]) -> str:
    """The first of some names, and how many there are besides."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" if names else "none"
