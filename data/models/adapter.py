"""Whether a file of LoRA weights is whole, from its header; nothing here imports torch."""

import re
from collections.abc import Iterable
from pathlib import Path

from data.artifacts.readable import UnreadableError
from data.models.safetensors_header import read_header, some

ADAPTER = "pytorch_lora_weights.safetensors"
"""The name of LoRA weights in a folder; diffusers', and that of our training."""
DOWN = re.compile(r"(?<=lora_)(A|down)(?=\.)|(?<=lora\.|ayer\.)down(?=\.)")
UP = re.compile(r"(?<=lora_)(B|up)(?=\.)|(?<=lora\.|ayer\.)up(?=\.)")
"""How peft, diffusers and kohya name the first and second matrix of a layer."""
READ = re.compile(r"(A|B|down|up)\.weight$")
"""How such a name ends."""


def check_adapter(path: Path, what: str) -> None:
    """Refuse LoRA weights that are damaged or incomplete; messages begin with `what`.

    Raises:
        UnreadableError: Names the file, what is wrong with it, and what to do.
    """
    try:
        tensors = read_header(path, zeros=True)
    except UnreadableError as error:
        raise UnreadableError(f"{what}: {error}") from error
    if not down_matrices(tensors):
        raise UnreadableError(
            f"{what}: {path} has no LoRA weights for the UNet or the text encoders; it has "
            f"{some(sorted(tensors))}. LoHa, LoKr and whole models are not read as LoRA"
        )
    if unread := sorted(name for name in tensors if _is_matrix(name) and not READ.search(name)):
        raise UnreadableError(
            f"{what}: {path} has names of LoRA weights that diffusers does not read, such as "
            f"{some(unread)}; save the adapter with save_lora_weights (diffusers)"
        )
    if unpaired := unpaired_matrices(tensors):
        raise UnreadableError(
            f"{what}: {path} has only one of a layer's two matrices: {some(unpaired)}; it is "
            "incomplete: fetch or save it again"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating and not name.endswith(".alpha"):
            raise UnreadableError(
                f"{what}: {path} has {name} in {tensor.dtype}; weights are read in F32, F16, BF16 "
                "or F64, and quantised ones must be converted first"
            )


def down_matrices(names: Iterable[str]) -> list[str]:
    """The names of each layer's first matrix."""
    return sorted(name for name in names if DOWN.search(name))


def unpaired_matrices(names: Iterable[str]) -> list[str]:
    """The names of matrices whose twin is missing."""
    names = list(names)
    twins = {DOWN.sub(_twin, name): name for name in down_matrices(names)}
    ups = {name for name in names if UP.search(name)}
    alone = [name for twin, name in twins.items() if twin not in ups]
    return sorted([*alone, *(ups - twins.keys())])


def _is_matrix(name: str) -> bool:
    return bool(DOWN.search(name) or UP.search(name))


def _twin(match: re.Match[str]) -> str:
    return "B" if match[0] == "A" else "up"
