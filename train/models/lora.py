"""LoRA: the policy is the frozen base with a small adapter, and so is the reference.

Both adapters live in one denoiser, and a forward pass uses one of them. So the reference needs no
second denoiser, and its refresh copies the adapter alone.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from data.models.family import Family
from train.config import LoraSpec
from train.models.memory import ParameterCounts
from train.models.quantized import quantized_layers

POLICY = "policy"
REFERENCE = "reference"
"""Names of the two adapters in the denoiser's parameters."""


def attach(denoiser: nn.Module, spec: LoraSpec, seed: int, *, with_reference: bool) -> None:
    """Freeze the denoiser, and add the policy's adapter and, `with_reference`, the reference's.

    Both start equal: A is drawn from `seed` and B is 0, so the policy starts as the base.

    Raises:
        ValueError: A name in `train.lora.targets` fits no layer.
    """
    assert spec.rank, "an adapter that starts from a file has the file's rank by now"
    targets = spec.targets or Family.lora_targets
    check_targets(denoiser, targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.rank * spec.scale,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    dtype = next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
    for name in (POLICY, REFERENCE) if with_reference else (POLICY,):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # drawn on the CPU
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the other adapter
            torch.manual_seed(seed)
            inject_adapter_in_model(config, denoiser, adapter_name=name)
    for name, parameter in denoiser.named_parameters():
        if parameter.is_floating_point():  # peft's are fp32; DeepSpeed has the masters
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(belongs(name, POLICY))
    choose(layers(denoiser), POLICY)
    denoiser.eval()  # new layers are in training mode


def check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    """Check that every target fits a layer.

    Raises:
        ValueError: Some do not; names them, and the layers there are.
    """
    kinds = (nn.Linear, nn.Conv2d)
    layer_names = {name for name, layer in denoiser.named_modules() if isinstance(layer, kinds)}
    missing = [
        end for end in targets if not any(f".{name}".endswith(f".{end}") for name in layer_names)
    ]
    if missing:
        ends = {".".join(name.split(".")[-2:]) if name[-1].isdigit() else name.split(".")[-1]
                for name in layer_names}  # fmt: skip
        raise ValueError(
            f"train.lora.targets has {', '.join(missing)}, but no layer of the denoiser is named "
            f"so; allowed are {', '.join(sorted(ends))}, or longer ends of a layer's name"
        )


def belongs(parameter: str, adapter: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return any(f".{part}.{adapter}." in parameter for part in ("lora_A", "lora_B"))


def counts(denoiser: nn.Module) -> ParameterCounts:
    """Count the parameters of the base and of the policy's adapter."""
    sizes = {name: parameter.numel() for name, parameter in denoiser.named_parameters()}
    quantized = quantized_layers(denoiser)
    sizes |= {name: layer.in_features * layer.out_features for name, layer in quantized.items()}
    trained = (p.shape for p in denoiser.parameters() if p.requires_grad)
    return ParameterCounts(
        denoiser=sum(size for name, size in sizes.items() if ".lora_" not in name),
        adapter=sum(size for name, size in sizes.items() if belongs(name, POLICY)),
        factored=sum(map(factored, trained)),
        quantized=sum(sizes[name] for name in quantized),
        quantized_bytes=sum(layer.nbytes for layer in quantized.values()),
    )


def factored(shape: torch.Size) -> int:
    """How many numbers Adafactor keeps of a parameter.

    They are sums over its last dimension and over its last but one; of a vector, one for each.
    """
    if len(shape) < 2:
        return shape.numel()
    return shape.numel() // shape[-1] + shape.numel() // shape[-2]


def of_reference(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The reference's adapter, by the names of the policy's parameters that it follows."""
    return {
        name.replace(f".{REFERENCE}.", f".{POLICY}."): parameter
        for name, parameter in denoiser.named_parameters()
        if belongs(name, REFERENCE)
    }


def layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    """The layers with adapters."""
    return [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]


def choose(tuner_layers: list[BaseTunerLayer], *adapters: str) -> None:
    """Let the layers use these adapters, or none: the base alone. Changes no tensor.

    peft's own switch also turns `requires_grad` on and off, which DeepSpeed has built upon.
    """
    for layer in tuner_layers:
        layer._active_adapter = list(adapters)


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """The policy's denoiser with the reference's adapter, or without one; has no gradient."""

    denoiser: nn.Module
    switched: list[BaseTunerLayer]
    adapters: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward pass."""
        # Not in inference mode: the policy's backward pass may use what ZeRO 3 gathers here.
        with self._instead(), torch.inference_mode(mode=False), torch.no_grad():
            return self.denoiser(*args, **kwargs)

    @contextlib.contextmanager
    def _instead(self) -> Iterator[None]:
        choose(self.switched, *self.adapters)
        try:
            yield
        finally:  # also before the backward pass, which may recompute the policy's activations
            choose(self.switched, POLICY)


def as_reference(denoiser: nn.Module) -> AdapterReference:
    """The reference in the policy's denoiser: its own adapter, or the base if it has none."""
    adapters = (REFERENCE,) if of_reference(denoiser) else ()
    return AdapterReference(denoiser, layers(denoiser), adapters)


# --- the result ----------------------------------------------------------------------------------


def in_diffusers_format(
    weights: Mapping[str, Tensor], scale: float, part: str
) -> dict[str, Tensor]:
    """Convert the policy's adapter to the format that diffusers reads, in float32.

    `part` is the denoiser's folder, `unet` or `transformer`, which begins the names. The scale is
    multiplied into B, because readers take it as 1 if a file does not give one.
    """
    adapter = {}
    for name, weight in weights.items():
        key = f"{part}.{name.replace(f'.{POLICY}.', '.')}"
        adapter[key] = weight.float() * (scale if ".lora_B." in key else 1.0)
    return adapter


@torch.no_grad()
def merge(denoiser: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Add an adapter in diffusers' format to a denoiser's weights: W + B A, or its convolution."""
    for key, down in adapter.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.partition(".")[2].removesuffix(".lora_A.weight")
        layer = denoiser.get_submodule(name)
        up = adapter[key.replace(".lora_A.", ".lora_B.")]
        weight = layer.get_parameter("weight")
        moved = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        weight.add_(moved.to(weight.dtype))
