"""A frozen base in 4 or 8 bits, under an adapter: QLoRA (Dettmers et al. 2023).

Each product of a linear layer restores the weight and forgets it again, in the forward pass and
once more in the backward pass. So a layer computes the same numbers with and without a gradient,
and policy and reference agree at first. The layers of bitsandbytes, and with them diffusers' own
quantization, promise no such thing: they choose among kernels by whether a gradient is needed.
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional

from train.config import Quantize

LARGEST = 127
"""Of a weight in 8 bits, whose sign is one of them."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in fewer bits; computes in its own format.

    The weight is a parameter without a gradient, which no checkpoint has; what it takes to restore
    it is none, so that nobody rounds that to another format.
    """

    def __init__(self, layer: nn.Linear, kind: Quantize, device: torch.device) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach().to(device)
        self.kind, self.dtype = kind, weight.dtype
        stored: Tensor
        self.scales: Any
        stored, self.scales = _nf4(weight) if kind is Quantize.nf4 else in_8_bits(weight)
        self.weight = nn.Parameter(stored, requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    @property
    def nbytes(self) -> int:
        """Memory of the weight and its scales, without the KiB of codes that nf4 has besides."""
        parts = [self.scales]
        if self.kind is Quantize.nf4:
            parts = [self.scales.absmax, self.scales.state2.absmax]
        return self.weight.nbytes + sum(int(part.nbytes) for part in parts)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The rounded weight, in a format to compute in."""
        if self.kind is Quantize.nf4:
            whole: Tensor = _library().dequantize_4bit(self.weight, self.scales)
            return whole.to(dtype)
        return torch.mul(self.weight.to(dtype), self.scales.to(dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Compute input W^T + bias, with the restored W."""
        # Z-Image's timesteps come in fp32, unless the weight is of another floating format.
        product: Tensor = _Product.apply(input.to(self.dtype), self.bias, self)
        return product


class _Product(torch.autograd.Function):
    """A linear layer that keeps nothing for its backward pass, as its weight needs no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(input, layer.restored(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.restored(gradient.dtype), None, None


def quantize(denoiser: nn.Module, kind: Quantize, device: torch.device) -> None:
    """Put a quantized layer in the place of each linear one, one by one.

    The device never has the whole weights: they are moved there layer by layer.
    """
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, nn.Linear):
            denoiser.set_submodule(name, QuantizedLinear(layer, kind, device))


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers, by the names of their weights."""
    return {
        f"{name}.weight": layer
        for name, layer in denoiser.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def in_8_bits(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Tensor]:
    """Round the weights to integers, and give each row's unit, so that W is about integers x unit.

    The unit is the largest of the row over 127; it is in the weight's format, and rounding is to
    multiples of the unit as it is stored.
    """
    largest = weight.abs().amax(1, keepdim=True)
    unit = (largest / LARGEST).clamp(min=torch.finfo(weight.dtype).tiny)
    integers = (weight.float() / unit.float()).round().clamp(-LARGEST, LARGEST)
    return integers.to(torch.int8), unit


def _nf4(weight: Tensor) -> tuple[Tensor, Any]:
    """NF4 in blocks of 64, whose scales are in 8 bits in blocks of 256 (double quantization)."""
    stored, state = _library().quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return stored, state


def _library() -> Any:
    return import_module("bitsandbytes.functional")
