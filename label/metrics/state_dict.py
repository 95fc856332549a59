"""Weight files -> tensors, safely: safetensors, or pickles read with `weights_only=True`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.artifacts.readable import UnreadableError, check_readable
from data.models.fit import misfit
from data.models.safetensors_header import index_files
from label.metrics.weights import WeightsError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Number formats that weights are read in."""


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU, whatever wraps them.

    Reads .safetensors, an index of several files, and torch pickles with `weights_only=True`
    (plain, or under "state_dict"); a "module." in front of every key is removed.

    Raises:
        WeightsError: The file is damaged, or holds anything but tensors.
    """
    try:
        if path.name.endswith(".index.json"):
            parts = [read_state(part) for part in index_files(path)]
            return {key: value for part in parts for key, value in part.items()}
        check_readable(path)
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnreadableError as error:
        raise WeightsError(str(error)) from error
    except (OSError, RuntimeError, SafetensorError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error
    except (
        Exception
    ) as error:  # pickle.UnpicklingError says how to switch the safety off; we do not
        raise WeightsError(
            f"{path} holds more than tensors and is not loaded, because that would run its code; "
            "convert it once, where you trust it and its authors' code is at hand: "
            'torch.save(torch.load("old.pt", weights_only=False).state_dict(), "new.pt")'
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no dictionary of tensors")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def check_state(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that does not fit its architecture, before it is loaded.

    Raises:
        WeightsError: Names missing and unexpected keys, the first wrong shape or number format.
    """
    if problem := misfit(state, wanted):
        raise WeightsError(f"{path} {problem}")
    for key, tensor in wanted.items():
        if tensor.is_floating_point() and state[key].dtype not in FLOATS:
            raise WeightsError(
                f"{path} has {key} in {state[key].dtype}; weights are read in fp32, fp16, bf16 or "
                "fp64, and quantised ones must be converted first"
            )


def load_exactly(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    """Fill a model with a checkpoint that fits it key for key."""
    check_state(path, state, model.state_dict())
    model.load_state_dict(dict(state))
