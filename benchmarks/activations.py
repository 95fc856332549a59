"""Activations that training holds for its backward pass: `python -m benchmarks.activations`.

Counted on tensors without data (PyTorch's fake tensors), by the kernels of a CPU; a GPU's attention
keeps the same. What a step takes besides, for a moment, is not in it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shapes import SD15, SD21, SDXL
from train.config import ActivationCheckpointing
from train.models.activation_checkpointing import checkpoint_activations

TOKENS = 77
MODELS: dict[str, Mapping[str, Any]] = {
    "SD1.5 at 512": SD15, "SD2.1 at 768": SD21, "SDXL at 1024": SDXL,
}  # fmt: skip
COUNTED = {
    "SD1.5 at 512": (1.74, 1.15, 0.29),
    "SD2.1 at 768": (3.91, 2.58, 0.65),
    "SDXL at 1024": (12.83, 8.28, 1.09),
}
"""What `table` prints, for those who have no time to count."""
WORLDS = {"sd15": "SD1.5 at 512", "sdxl": "SDXL at 1024"}
"""Benchmark shape -> the model that it is."""


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows which of the tensors that were made within it are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made; views of what came from outside are not made."""
        outside = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = func(*args, **kwargs or {})
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and id_of(tensor) not in outside:
                storage = tensor.untyped_storage()
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._made[id_of(tensor)] = weak, storage.nbytes()
        return results

    @property
    def bytes(self) -> int:
        """Of those that are there."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


def id_of(tensor: Tensor) -> int:
    """The address of a tensor's storage object."""
    return int(tensor.untyped_storage()._cdata)


def bytes_kept(unet: Any, images: int, dtype: torch.dtype) -> int:
    """Bytes that a UNet's forward pass over so many images leaves for its backward pass."""
    config, side = unet.config, unet.config.sample_size
    noisy = torch.zeros(images, config.in_channels, side, side, dtype=dtype)
    states = torch.zeros(images, TOKENS, config.cross_attention_dim, dtype=dtype)
    added = None
    if config.addition_embed_type == "text_time":
        ids = 6 * config.addition_time_embed_dim
        pooled = torch.zeros(images, config.projection_class_embeddings_input_dim - ids)
        added = {"text_embeds": pooled.to(dtype), "time_ids": torch.zeros(images, 6)}
    with Alive() as alive:
        answer = unet(noisy, torch.zeros(images), states, added_cond_kwargs=added).sample
        count: int = alive.bytes
    del answer
    return count


def a_pair(config: Mapping[str, Any], what: ActivationCheckpointing) -> int:
    """Bytes held for each pair more, in bf16, at the size that the model is for."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            unet = UNet2DConditionModel(**config).eval()
            checkpoint_activations(unet, what)
            return bytes_kept(unet, 4, torch.bfloat16) - bytes_kept(unet, 2, torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)


def gib_a_pair(shape: str, what: ActivationCheckpointing) -> float | None:
    """GiB held for each pair more of one of the benchmarks' shapes; None of a reduced one."""
    if shape not in WORLDS:
        return None
    return COUNTED[WORLDS[shape]][list(ActivationCheckpointing).index(what)]


def table() -> str:
    """GiB a pair, as Markdown."""
    head = [f"`{what.value}`" for what in ActivationCheckpointing]
    lines = [f"| | {' | '.join(head)} |", "|---" + "|---:" * len(head) + "|"]
    for name, config in MODELS.items():
        each = [f"{a_pair(config, what) / 2**30:.2f}" for what in ActivationCheckpointing]
        lines.append(f"| {name} | {' | '.join(each)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
