"""Settings of the model: its weights, their format, and how it is run."""

import math
from dataclasses import dataclass
from enum import Enum

from data.models.forward_process import Prediction


class Precision(Enum):
    """Format of the policy's and the reference's weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class ActivationCheckpointing(Enum):
    """Which activations are recomputed in the backward pass instead of kept."""

    none = "none"
    """None: every activation is kept."""
    selective = "selective"
    """Those of norms, activation functions and sums; those of matrix products, convolutions and
    attention are kept."""
    full = "full"
    """Those of whole blocks: least memory, a quarter more arithmetic."""


class Quantize(Enum):
    """How the weights of linear layers are stored, where they are not trained."""

    none = "none"
    """As they are."""
    int8 = "int8"
    """Integers of 8 bits, and a unit for each row."""
    nf4 = "nf4"
    """NormalFloat of 4 bits with double quantization (Dettmers et al. 2023), by bitsandbytes."""


@dataclass(kw_only=True, slots=True)
class ModelSpec:
    """The model to align: a diffusers folder of one of the families in data/families/."""

    path: str = "???"
    """Diffusers folder, a hub id `owner/name` (then `revision` is required), or a single
    `.safetensors` file of SD1.x, SD2.x or SDXL, which is converted once."""
    revision: str | None = None
    """The hub's 40-digit commit; never a branch, which changes under a run."""
    config: str | None = None
    """For a single file: the diffusers folder, or the hub id `owner/name@commit`, from which its
    configuration and tokenizers come; the groups `sd15`, `sd21`, `sd21_512` and `sdxl` have it."""
    resolution: int = 512
    """Side of the square training images in pixels."""
    vae_tile: int | None = None
    """Side in pixels of the tiles in which the VAE encodes and decodes in training, for less memory
    and numbers that differ a little at the seams; null takes images whole."""
    quantize: Quantize = Quantize.none
    """For LoRA: stores the linear layers of the frozen denoiser in fewer bits. Both policy and
    reference compute with the rounded weights; the result is the adapter on the whole ones."""
    prediction_type: Prediction | None = None
    """What the denoiser predicts, where the folder's `scheduler_config.json` does not say; without
    either, epsilon is assumed, and the run says so."""
    guidance: float | None = None
    """The guidance that a guidance-distilled model (FLUX.1 dev) is told in training; null is 3.5,
    the default of diffusers' scripts. Other models are told none and refuse the setting."""

    def __post_init__(self) -> None:
        if self.guidance is not None and not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise ValueError(f"model.guidance={self.guidance}; it must not be negative, or null")
        if self.vae_tile is not None and not 0 < self.vae_tile < self.resolution:
            raise ValueError(
                f"model.vae_tile={self.vae_tile} cuts no image of model.resolution="
                f"{self.resolution}; give fewer pixels, or null"
            )
        if self.resolution < 8:
            raise ValueError(f"model.resolution={self.resolution}; it must be at least 8 pixels")


USUAL_RANK = 16
"""The rank of an adapter that starts from the base, where the settings give none."""


@dataclass(kw_only=True, slots=True)
class LoraSpec:
    """Low-rank adaptation (Hu et al. 2021, Eq. 3): W + alpha / rank * B A, with W frozen."""

    rank: int | None = 0
    """Rows of A and columns of B; 0 trains all weights instead, null is the rank of `start`, or 16
    where there is none."""
    alpha: float | None = None
    """Strength of the adapter; null is that of `start`, or the rank, so that the factor is 1."""
    targets: list[str] | None = None
    """Layers of the denoiser that get an adapter, by the ends of their names; null takes those of
    `start`, or of the model's family: the attentions, for FLUX.1 also the feed-forward layers."""
    start: str | None = None
    """A LoRA file in the format of diffusers or kohya, or an adapter's folder, from which both
    policy and reference start; null starts from the base."""

    @property
    def scale(self) -> float:
        """The factor of B A."""
        assert self.rank
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def __post_init__(self) -> None:
        if self.start is not None and self.rank == 0:
            raise ValueError(
                f"train.lora.start={self.start} starts an adapter, but train.lora.rank=0 trains "
                "all weights; choose tuning=lora"
            )
        if self.rank is None:
            if self.start is None:
                self.rank = USUAL_RANK
        elif self.rank < 0:
            raise ValueError(f"train.lora.rank={self.rank}; it must not be negative")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"train.lora.alpha={self.alpha}; it must be above 0, or null")
        if self.rank and self.targets == []:
            raise ValueError("train.lora.targets is empty; name at least one layer, such as to_q")


class Offload(Enum):
    """What is kept in the machine's memory, and not in the GPU's."""

    none = "none"
    """Nothing."""
    optimizer = "optimizer"
    """Gradients and the optimizer's state, which takes its step on the CPU."""
    parameters = "parameters"
    """Under stage 3: the weights of policy and reference, too, which come layer by layer."""


@dataclass(kw_only=True, slots=True)
class ZeroSpec:
    """DeepSpeed's partitioning."""

    stage: int = 2
    """ZeRO stage 0 (none), 1 (optimizer), 2 (and gradients), 3 (and parameters)."""
    offload: Offload = Offload.none
    """What is kept in the machine's memory: less of the GPU's, for much time on the bus."""

    def __post_init__(self) -> None:
        least = {Offload.none: 0, Offload.optimizer: 2, Offload.parameters: 3}[self.offload]
        if 0 <= self.stage < least:
            raise ValueError(
                f"train.zero.offload={self.offload.value} needs zero=stage{least}"
                f"{' or stage3' if least == 2 else ''}, but zero.stage={self.stage}; choose that "
                "stage, or train.zero.offload=none"
            )
