"""Activations that training holds for its backward pass: `python -m benchmarks.activations`.

Counted on tensors without data (PyTorch's fake tensors), by the kernels of a CPU; a GPU's attention
keeps the same. What a step takes besides, for a moment, is not in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shapes import (
    FLUX_DEV,
    QWEN_IMAGE,
    SANA,
    SD15,
    SD21,
    SD35_LARGE,
    SD35_MEDIUM,
    SDXL,
    Z_IMAGE,
)
from data.families import flux, qwen_image, sana, sd1, sd3, sdxl, z_image
from data.models.family import Condition, Family, ModelConfig
from train.config import ActivationCheckpointing, LoraSpec
from train.models.activation_checkpointing import checkpoint_activations
from train.models.lora import attach

CLIP_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A denoiser, and how it is trained."""

    family: Family
    config: Mapping[str, Any]
    """What the denoiser's class takes."""
    side: int
    """Side of the latents."""
    tokens: int = CLIP_TOKENS
    """Tokens of a prompt's states."""
    lora_rank: int = 0
    """Rank of an adapter on the family's default layers; 0 trains all weights."""

    def denoiser(self, what: ActivationCheckpointing) -> Any:
        """Build it as the trainer does."""
        kind = getattr(diffusers, self.family.parts[self.family.denoiser])
        denoiser = kind(**self.config).eval()
        if self.lora_rank:
            targets = list(self.family.lora_targets)
            attach(
                denoiser, LoraSpec(rank=self.lora_rank, targets=targets), 0, with_reference=False
            )
        checkpoint_activations(denoiser, what)
        return denoiser


MODELS = {
    "SD1.5 at 512": TrainedModel(family=sd1.FAMILY, config=SD15, side=64),
    "SD2.1 at 768": TrainedModel(family=sd1.FAMILY, config=SD21, side=96),
    "SDXL at 1024": TrainedModel(family=sdxl.FAMILY, config=SDXL, side=128),
    "SD3.5 medium at 1024": TrainedModel(
        family=sd3.FAMILY, config=SD35_MEDIUM, side=128, tokens=CLIP_TOKENS + sd3.T5_TOKENS
    ),
    "SD3.5 large at 1024, LoRA of rank 16": TrainedModel(
        family=sd3.FAMILY,
        config=SD35_LARGE,
        side=128,
        tokens=CLIP_TOKENS + sd3.T5_TOKENS,
        lora_rank=16,
    ),
    "FLUX.1 dev at 1024, LoRA of rank 32": TrainedModel(
        family=flux.FAMILY, config=FLUX_DEV, side=128, tokens=flux.T5_TOKENS, lora_rank=32
    ),
    "Z-Image at 1024, LoRA of rank 32": TrainedModel(
        family=z_image.FAMILY, config=Z_IMAGE, side=128, tokens=z_image.TOKENS, lora_rank=32
    ),
    "Sana 1.6B at 1024, LoRA of rank 128": TrainedModel(
        family=sana.FAMILY, config=SANA, side=32, tokens=sana.TOKENS, lora_rank=128
    ),
    "Qwen-Image at 1024, LoRA of rank 32": TrainedModel(
        family=qwen_image.FAMILY,
        config=QWEN_IMAGE,
        side=128,
        tokens=qwen_image.TOKENS,
        lora_rank=32,
    ),
}
COUNTED = {
    "SD1.5 at 512": (1.74, 1.15, 0.29),
    "SD2.1 at 768": (3.91, 2.58, 0.65),
    "SDXL at 1024": (12.83, 8.28, 1.09),
    "SD3.5 medium at 1024": (22.04, 8.30, 0.68),
    "SD3.5 large at 1024, LoRA of rank 16": (27.62, 22.98, 1.56),
    "FLUX.1 dev at 1024, LoRA of rank 32": (49.37, 46.32, 3.06),
    "Z-Image at 1024, LoRA of rank 32": (65.44, 34.63, 2.19),
    "Sana 1.6B at 1024, LoRA of rank 128": (6.52, 4.55, 0.18),
    "Qwen-Image at 1024, LoRA of rank 32": (56.46, 46.28, 3.21),
}
"""What `table` prints, for those who have no time to count."""
WORLDS = {
    "sd15": "SD1.5 at 512", "sdxl": "SDXL at 1024", "sd35_medium": "SD3.5 medium at 1024",
}  # fmt: skip
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


def bytes_kept(model: TrainedModel, denoiser: Any, images: int, dtype: torch.dtype) -> int:
    """Bytes that a denoiser's forward pass over so many images leaves for its backward pass."""
    config = ModelConfig(index={}, denoiser=denoiser.config, vae={}, scheduler={})
    channels = model.family.latent_channels(config)
    noisy = torch.zeros(images, channels, model.side, model.side, dtype=dtype)
    condition = empty_condition(denoiser.config, images, model.tokens, dtype)
    with Alive() as alive:
        predicted = model.family.predict(denoiser, noisy, torch.zeros(images), condition)
        count: int = alive.bytes
    del predicted
    return count


def empty_condition(config: Any, images: int, tokens: int, dtype: torch.dtype) -> Condition:
    """A condition of zeros, in the shapes that a denoiser takes."""
    if "cap_feat_dim" in config:
        states = torch.zeros(images, tokens, config.cap_feat_dim, dtype=dtype)
        return Condition(states, lengths=(tokens,) * images)
    if "caption_channels" in config:
        states = torch.zeros(images, tokens, config.caption_channels, dtype=dtype)
        mask = torch.ones(images, tokens, dtype=torch.long)
        return Condition(states, {"encoder_attention_mask": mask})
    is_transformer = "joint_attention_dim" in config
    width = config.joint_attention_dim if is_transformer else config.cross_attention_dim
    states = torch.zeros(images, tokens, width, dtype=dtype)
    if "zero_cond_t" in config:
        mask = torch.ones(images, tokens, dtype=torch.long)
        return Condition(states, {"encoder_hidden_states_mask": mask})
    if is_transformer:
        pooled = torch.zeros(images, config.pooled_projection_dim, dtype=dtype)
        guided = {"guidance": torch.zeros(images)} if config.get("guidance_embeds") else {}
        return Condition(states, {"pooled_projections": pooled} | guided)
    if config.addition_embed_type != "text_time":
        return Condition(states)
    ids = 6 * config.addition_time_embed_dim
    pooled = torch.zeros(images, config.projection_class_embeddings_input_dim - ids, dtype=dtype)
    return Condition(states, {"text_embeds": pooled, "time_ids": torch.zeros(images, 6)})


def make_fake(denoiser: nn.Module) -> None:
    """Give a module weights of the fake mode in which this is called, as on the CPU."""
    for module in denoiser.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(fake, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):  # Qwen-Image's positions, which are no buffers
                setattr(module, name, torch.empty(value.shape, dtype=value.dtype))


def a_pair(
    model: TrainedModel, what: ActivationCheckpointing, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes held for each pair more, at the size that the model is for."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):  # peft cannot move fake tensors
            denoiser = model.denoiser(what)
        with FakeTensorMode():
            make_fake(denoiser)
            return bytes_kept(model, denoiser, 4, dtype) - bytes_kept(model, denoiser, 2, dtype)
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
    for name, model in MODELS.items():
        each = [f"{a_pair(model, what) / 2**30:.2f}" for what in ActivationCheckpointing]
        lines.append(f"| {name} | {' | '.join(each)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
