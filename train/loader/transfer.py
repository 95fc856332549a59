"""Copies to the device that nobody waits for."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU fetches it when it comes to it; the host does not wait."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned already: no second copy


def pinned(item: Any, device: torch.device) -> Any:
    """A dataclass whose tensors a GPU can fetch by itself; on a CPU it is the same object.

    It copies, so it is work for the thread that reads ahead.
    """
    return item if device.type != "cuda" else _mapped(item, lambda tensor: tensor.pin_memory())


def moved(item: Any, device: torch.device, stay: tuple[str, ...] = ()) -> Any:
    """A dataclass with its tensors on the device, but for those named in `stay`."""
    return _mapped(item, lambda tensor: onto(tensor, device), stay)


def _mapped(item: Any, change: Any, stay: tuple[str, ...] = ()) -> Any:
    values = {f.name: getattr(item, f.name) for f in fields(item) if f.name not in stay}
    return replace(item, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})
