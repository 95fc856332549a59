"""LoRA: the policy is the frozen base with a small adapter, and so is the reference.

Both adapters live in one UNet, and a forward pass uses one of them. So the reference needs no
second UNet, and its refresh copies the adapter alone.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from train.config import LoraSpec
from train.models.memory import ParameterCounts

POLICY = "policy"
REFERENCE = "reference"
"""Names of the two adapters in the UNet's parameters."""


def attach(unet: nn.Module, spec: LoraSpec, seed: int, *, moving: bool) -> None:
    """Freeze the UNet and add the policy's adapter; if the reference moves, also the reference's.

    Both start equal: A is drawn from `seed` and B is 0, so the policy starts as the base.

    Raises:
        ValueError: A name in `train.lora.targets` fits no layer of the UNet.
    """
    check_targets(unet, spec)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.rank * spec.scale,
        target_modules=list(spec.targets),
        init_lora_weights="gaussian",
    )
    dtype = next(unet.parameters()).dtype
    for name in (POLICY, REFERENCE) if moving else (POLICY,):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # drawn on the CPU
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the other adapter
            torch.manual_seed(seed)
            inject_adapter_in_model(config, unet, adapter_name=name)
    for name, parameter in unet.named_parameters():
        parameter.data = parameter.data.to(dtype)  # peft's are fp32; DeepSpeed has the masters
        parameter.requires_grad_(belongs(name, POLICY))
    choose(layers(unet), POLICY)
    unet.eval()  # new layers are in training mode


def check_targets(unet: nn.Module, spec: LoraSpec) -> None:
    """Check that every target fits a layer.

    Raises:
        ValueError: Some do not; names them, and the layers there are.
    """
    kinds = (nn.Linear, nn.Conv2d)
    layer_names = {name for name, layer in unet.named_modules() if isinstance(layer, kinds)}
    missing = [
        end
        for end in spec.targets
        if not any(f".{name}".endswith(f".{end}") for name in layer_names)
    ]
    if missing:
        ends = {".".join(name.split(".")[-2:]) if name[-1].isdigit() else name.split(".")[-1]
                for name in layer_names}  # fmt: skip
        raise ValueError(
            f"train.lora.targets has {', '.join(missing)}, but no layer of the UNet is named so; "
            f"allowed are {', '.join(sorted(ends))}, or longer ends of a layer's name"
        )


def belongs(parameter: str, adapter: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return any(f".{part}.{adapter}." in parameter for part in ("lora_A", "lora_B"))


def counts(unet: nn.Module) -> ParameterCounts:
    """Count the parameters of the base and of the policy's adapter."""
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    return ParameterCounts(
        unet=sum(size for name, size in sizes.items() if ".lora_" not in name),
        adapter=sum(size for name, size in sizes.items() if belongs(name, POLICY)),
    )


def of_reference(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The reference's adapter, by the names of the policy's parameters that it follows."""
    return {
        name.replace(f".{REFERENCE}.", f".{POLICY}."): parameter
        for name, parameter in unet.named_parameters()
        if belongs(name, REFERENCE)
    }


def layers(unet: nn.Module) -> list[BaseTunerLayer]:
    """The layers with adapters."""
    return [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]


def choose(tuner_layers: list[BaseTunerLayer], *adapters: str) -> None:
    """Let the layers use these adapters, or none: the base alone. Changes no tensor.

    peft's own switch also turns `requires_grad` on and off, which DeepSpeed has built upon.
    """
    for layer in tuner_layers:
        layer._active_adapter = list(adapters)


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """The policy's UNet with the reference's adapter, or without one; has no gradient."""

    unet: nn.Module
    switched: list[BaseTunerLayer]
    adapters: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet's forward pass."""
        # Not in inference mode: the policy's backward pass may use what ZeRO 3 gathers here.
        with self._instead(), torch.inference_mode(mode=False), torch.no_grad():
            return self.unet(*args, **kwargs)

    @contextlib.contextmanager
    def _instead(self) -> Iterator[None]:
        choose(self.switched, *self.adapters)
        try:
            yield
        finally:  # also before the backward pass, which may recompute the policy's activations
            choose(self.switched, POLICY)


def as_reference(unet: nn.Module) -> AdapterReference:
    """The reference in the policy's UNet: its own adapter, or the base if it has none."""
    adapters = (REFERENCE,) if of_reference(unet) else ()
    return AdapterReference(unet, layers(unet), adapters)


# --- the result ----------------------------------------------------------------------------------


def in_diffusers_format(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Convert the policy's adapter to the format that diffusers reads, in float32.

    The scale is multiplied into B, because readers take it as 1 if a file does not give one.
    """
    adapter = {}
    for name, weight in weights.items():
        key = f"unet.{name.replace(f'.{POLICY}.', '.')}"
        adapter[key] = weight.float() * (scale if ".lora_B." in key else 1.0)
    return adapter


@torch.no_grad()
def merge(unet: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Add an adapter in diffusers' format to a UNet's weights: W + B A, or its convolution."""
    for key, down in adapter.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight"))
        up = adapter[key.replace(".lora_A.", ".lora_B.")]
        weight = layer.get_parameter("weight")
        moved = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        weight.add_(moved.to(weight.dtype))
