"""Whether a file's tensors are those of an architecture: one check for all that is loaded."""

from collections.abc import Mapping
from typing import Any

from data.models.safetensors_header import some

ADAPTER_PARTS = (".base_layer.", ".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
"""What peft adds to the names of a model that an adapter wraps."""
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
"""What DataParallel, torch.compile, FSDP and peft put before the names of a model they wrap."""


def misfit(actual: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How tensors (anything with a `shape`) differ from those that are wanted; empty if not at all.

    Says what is missing, what is unexpected, or the first wrong shape, and a likely reason.
    """
    missing, unexpected = (
        sorted(wanted.keys() - actual.keys()),
        sorted(actual.keys() - wanted.keys()),
    )
    if missing or unexpected:
        return (
            f"does not fit its architecture: missing {some(missing)}; unexpected "
            f"{some(unexpected)}{_reason(missing, unexpected)}"
        )
    for name, tensor in wanted.items():
        if tuple(actual[name].shape) != tuple(tensor.shape):
            return (
                f"does not fit its architecture: {name} has shape {tuple(actual[name].shape)}, "
                f"needed is {tuple(tensor.shape)}"
            )
    return ""


def _reason(missing: list[str], unexpected: list[str]) -> str:
    if any(part in f".{name}." for name in unexpected for part in ADAPTER_PARTS):
        return (
            "; an adapter was not merged: save the model after merge_and_unload() (peft) or "
            "fuse_lora() and unload_lora_weights() (diffusers)"
        )
    for wrapper in WRAPPERS:
        if unexpected and all(name.startswith(wrapper) for name in unexpected):
            return f"; the model was saved inside a wrapper: remove {wrapper!r} from its names"
    if missing and not unexpected:
        return "; the file is incomplete: fetch or save it again"
    return ""
