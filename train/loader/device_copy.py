"""Non-blocking host-to-device copies."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from data.devices import to_device


def pin(item: Any, device: torch.device) -> Any:
    """Copy a dataclass's tensors to pinned memory, from which a GPU reads without the host's help.

    On a CPU it returns the same object. It copies, so it belongs in the prefetch thread. Tensors
    become contiguous first: a strided copy to the device goes through pageable memory, and waits.
    """
    if device.type != "cuda":
        return item
    return _mapped(item, lambda tensor: tensor.contiguous().pin_memory())


def copy_to(device: torch.device, item: Any, stay: tuple[str, ...] = ()) -> Any:
    """Copy a dataclass's tensors to the device, except for the fields named in `stay`."""
    return _mapped(item, lambda tensor: to_device(tensor, device), stay)


def _mapped(item: Any, change: Any, stay: tuple[str, ...] = ()) -> Any:
    values = {f.name: getattr(item, f.name) for f in fields(item) if f.name not in stay}
    return replace(item, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})
