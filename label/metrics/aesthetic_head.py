"""The head of LAION's aesthetic predictor v2: five linear layers on a CLIP image embedding."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from label.metrics.backbones import Backbone
from label.metrics.base import ResolvedMetric
from label.metrics.state_dict import read_state
from label.metrics.weights import WeightsError

LAYERS = (0, 2, 4, 6, 7)
"""Linear layers of the published checkpoint; between them is only dropout, no activation."""


@dataclass(frozen=True, slots=True)
class Head:
    """The five layers as one: w . x + b."""

    weight: Float[Tensor, " dim"]
    bias: Float[Tensor, ""]


@dataclass(frozen=True, slots=True)
class Aesthetic:
    """How pleasing an image is, about 1 to 10 with the published weights; knows no prompt."""

    resolved: ResolvedMetric
    backbone: Backbone
    head: Head
    reads_prompt: bool = False

    def score(
        self, images: Float[Tensor, "row dim"], texts: Float[Tensor, "row dim"]
    ) -> Float[Tensor, " row"]:
        """One dot product with the L2-normalised image embedding; `texts` is ignored."""
        return images @ self.head.weight + self.head.bias


def load_head(path: Path) -> Head:
    """Multiply the layers of `layers.{0,2,4,6,7}` into one; exact up to rounding.

    Raises:
        WeightsError: The file has other keys, or layers that do not fit each other.
    """
    state = read_state(path)
    wanted = {f"layers.{i}.{part}" for i in LAYERS for part in ("weight", "bias")}
    if state.keys() != wanted:
        raise WeightsError(
            f"{path} is not LAION's aesthetic head; it has {', '.join(sorted(state)[:4])}..., "
            f"needed are layers.{{{','.join(map(str, LAYERS))}}}.weight and .bias"
        )
    dims = {"weight": 2, "bias": 1}
    for key, tensor in state.items():
        if tensor.ndim != dims[key.rsplit(".", 1)[1]] or not tensor.is_floating_point():
            raise WeightsError(
                f"{path} has {key} of shape {tuple(tensor.shape)} in {tensor.dtype}; needed are "
                "matrices and vectors of floating point numbers"
            )
    first = state["layers.0.weight"]
    weight = torch.eye(first.shape[-1], dtype=torch.float64)
    bias = torch.zeros(first.shape[-1], dtype=torch.float64)
    try:
        for i in LAYERS:
            layer = state[f"layers.{i}.weight"].double()
            bias = layer @ bias + state[f"layers.{i}.bias"].double()
            weight = layer @ weight
        return Head(weight.reshape(first.shape[-1]).float(), bias.reshape(()).float())
    except RuntimeError as error:
        raise WeightsError(f"{path}: the head's layers do not fit each other: {error}") from error


def check_head(resolved: ResolvedMetric, head: Head, dim: int) -> None:
    """Refuse a head for another backbone.

    Raises:
        WeightsError: The head takes embeddings of another length than the backbone gives.
    """
    if head.weight.numel() != dim:
        raise WeightsError(
            f"metrics.{resolved.name}.head={resolved.files['head']} takes embeddings of length "
            f"{head.weight.numel()}, but metrics.{resolved.name}.weights gives {dim}"
        )
