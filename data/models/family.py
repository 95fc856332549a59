"""What a family of models is: one description, which every stage asks.

A family is one file in `data/families/` that defines a `FAMILY`. To which family a folder belongs
is decided from its JSON files; so nothing here imports torch, and the methods that compute receive
tensors, or import torch when they run.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int

from data.images import Size
from data.models.forward_process import DiscreteProcess, Prediction
from data.models.latent_scale import SHIFT, LatentScale, latent_scale
from data.models.rectified_flow import SCHEDULERS, FlowProcess, flow_process
from data.models.vae_config import latent_channels, latent_factor

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor
else:
    Tensor = Any  # shapes are checked all the same

Latents = Float[Tensor, "image channel height width"]
"""Latents, noise, or what a denoiser predicts of them."""

Json = Mapping[str, Any]

Process = DiscreteProcess | FlowProcess
"""A forward process that a model can be trained with."""

Encoders = Mapping[str, Any]
"""Folder of a text encoder -> a `TextEncoder`, or whatever else is called as one."""

NO_PART = [None, None]
"""What `model_index.json` says of a part that a folder does without."""


class ModelError(ValueError):
    """A model cannot be used; the message says why, and what can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A diffusers folder's configuration files, as JSON values."""

    index: Json
    """`model_index.json`."""
    denoiser: Json
    """The `config.json` of the UNet or the transformer."""
    vae: Json
    scheduler: Json

    @property
    def vae_factor(self) -> int:
        """Pixels of an image's side for one of its latents."""
        return latent_factor(self.vae)

    def has(self, part: str) -> bool:
        """Whether the folder has a part."""
        return bool(self.index.get(part, NO_PART) != NO_PART)


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Encoded prompts."""

    states: Float[Tensor, "prompt token width"]
    pooled: Float[Tensor, "prompt pooled"] | None = None
    """A summary of each whole prompt, where the family has one."""
    length: Int[Tensor, " prompt"] | None = None
    """Tokens of each prompt, which are its first, where the denoiser tells them from padding; on
    the CPU."""

    @classmethod
    def masked(
        cls,
        states: Float[Tensor, "prompt given width"],
        mask: Int[Tensor, "prompt given"],
        tokens: int,
        drop: int = 0,
    ) -> "PromptEmbeds":
        """The states of the tokens in a mask but the first `drop`, and zeros up to `tokens`."""
        import torch
        from torch.nn.functional import pad

        order = mask.argsort(dim=1, descending=True, stable=True)
        states = states.gather(1, order[..., None].expand_as(states))[:, drop:]
        length = mask.sum(1) - drop
        beyond = torch.arange(states.shape[1], device=mask.device) >= length[:, None]
        states = states.masked_fill(beyond[..., None], 0)
        return cls(pad(states, (0, 0, 0, tokens - states.shape[1])), length=length.cpu())

    def rows(self, index: Int[Tensor, " row"]) -> "PromptEmbeds":
        """Some rows, in any order and number."""
        return PromptEmbeds(
            self.states[index],
            None if self.pooled is None else self.pooled[index],
            None if self.length is None else self.length[index.to(self.length.device)],
        )

    def to(self, device: "torch.device", dtype: "torch.dtype") -> "PromptEmbeds":
        """On a device and in a number format."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return PromptEmbeds(self.states.to(device, dtype), pooled, self.length)

    def twice(self) -> "PromptEmbeds":
        """All rows for the winners, and once more for the losers."""
        pooled = None if self.pooled is None else self.pooled.repeat(2, 1)
        length = None if self.length is None else self.length.repeat(2)
        return PromptEmbeds(self.states.repeat(2, 1, 1), pooled, length)


@dataclass(frozen=True, slots=True)
class Condition:
    """What a denoiser is conditioned on, one row for each image."""

    states: Float[Tensor, "image token width"]
    added: dict[str, Tensor] | None = None
    """Further tensors, by the names under which the family passes them."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each image's text, where the denoiser gets no padding."""


class Family(ABC):
    """Models of one pipeline class of diffusers: how they are recognised, run and exported."""

    pipeline: ClassVar[str]
    """The class in `model_index.json`."""
    parts: ClassVar[Mapping[str, str]]
    """Folder that is used -> its class; the scheduler's, which may be one of several, is empty."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts that a folder may do without."""
    denoiser: ClassVar[str] = "unet"
    """The part that is trained. It begins the names of an adapter's weights."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that LoRA adapts by default, by the ends of their names."""
    patch: ClassVar[int] = 1
    """Latents along a side of what the denoiser takes as one; sides must be multiples of it."""
    is_guided: ClassVar[bool] = True
    """Whether sampling compares the prompt with an empty one (classifier-free guidance)."""

    @property
    def name(self) -> str:
        """The name of the family's file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The parts that encode text."""
        return tuple(part for part in self.parts if part.startswith("text_encoder"))

    def parts_in(self, index: Json) -> tuple[str, ...]:
        """The parts of the family that a folder is to have, by its `model_index.json`."""
        return tuple(
            part
            for part in self.parts
            if part not in self.optional or index.get(part, NO_PART) != NO_PART
        )

    def check(self, what: str, config: ModelConfig) -> None:
        """Refuse models that share the class but cannot be aligned; messages begin with `what`.

        Raises:
            ModelError: Says what the model is, and what to give instead.
        """
        latent, channels = latent_channels(config.vae), self.latent_channels(config)
        if channels != latent:
            raise ModelError(
                f"{what} has a denoiser with {channels} input channels for latents of {latent}: an "
                "inpainting or depth model, or another that is given an image, which text-image "
                "pairs cannot train; give its text-to-image base"
            )

    def check_resolution(self, setting: str, resolution: int, config: ModelConfig) -> None:
        """Refuse images that the model cannot take; `setting` names their side.

        Raises:
            ModelError: The side in pixels is no multiple of what it must be.
        """
        multiple = config.vae_factor * self.patch
        if resolution % multiple:
            each = "the VAE's factor" if self.patch == 1 else "the pixels of a patch of latents"
            raise ModelError(f"{setting}={resolution} is no multiple of {multiple}, {each}")

    def latent_channels(self, config: ModelConfig) -> int:
        """Channels of the latents that the denoiser takes."""
        return int(config.denoiser.get("in_channels", 4))

    @abstractmethod
    def process(
        self, what: str, index: Json, scheduler: Json, prediction: Prediction | None = None
    ) -> Process:
        """The forward process, by `model_index.json` and the scheduler's configuration.

        Raises:
            ForwardProcessError: The family has no such process.
        """

    @abstractmethod
    def latent_scale(self, what: str, vae: Json) -> LatentScale:
        """How latents are scaled, by the VAE's configuration.

        Raises:
            LatentScaleError: A value is wrong, or the pipeline would ignore it.
        """

    @abstractmethod
    def vae_in_fp32(self, vae: Json) -> bool:
        """Whether the VAE has to run in fp32 whatever the rest runs in."""

    def guidance(self, config: ModelConfig) -> float | None:
        """What a guidance-distilled denoiser is told in training; None for all others."""
        del config
        return None

    def text_settings(self, config: ModelConfig) -> Json:
        """What decides the encoded prompts besides the text encoders and tokenizers themselves."""
        del config
        return {}

    def pipeline_options(self, prompts: int, guidance: float) -> dict[str, Any]:
        """What the pipeline is called with for a guidance scale, of which 1 is none."""
        del prompts
        return {"guidance_scale": guidance}

    @abstractmethod
    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """Encode each prompt as the family's pipeline does; "" is its empty prompt."""

    @abstractmethod
    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The condition of images of height and width `size` in pixels, cut to the size `cut`."""

    @abstractmethod
    def predict(
        self, denoiser: Callable[..., Any], noisy: Latents, timestep: Tensor, condition: Condition
    ) -> Latents:
        """Run the denoiser as the family's pipeline does.

        `timestep` has a row for each image, in the process's own unit.
        """

    def guide(self, conditional: Latents, empty: Latents, scale: float) -> Latents:
        """Classifier-free guidance (Ho and Salimans 2022, Eq. 6, w + 1 = `scale`)."""
        return empty + scale * (conditional - empty)

    def pipeline_latents(self, noise: Latents) -> Tensor:
        """Latents in the shape that the pipeline takes as `latents`."""
        return noise


class FlowFamily(Family):
    """A family with a transformer and rectified flow, whose schedulers are no others'."""

    denoiser = "transformer"
    schedulers: ClassVar[tuple[str, ...]] = SCHEDULERS
    """Schedulers that the pipeline takes."""

    def process(
        self, what: str, index: Json, scheduler: Json, prediction: Prediction | None = None
    ) -> FlowProcess:
        """Rectified flow."""
        return flow_process(what, index, scheduler, prediction, self.schedulers)

    def latent_scale(self, what: str, vae: Json) -> LatentScale:
        """By shift and factor."""
        return latent_scale(what, self.pipeline, vae, SHIFT)

    def predict(
        self, denoiser: Callable[..., Any], noisy: Latents, timestep: Tensor, condition: Condition
    ) -> Latents:
        """The velocity at timestep 1000 sigma."""
        predicted: Tensor = denoiser(
            noisy,
            encoder_hidden_states=condition.states,
            timestep=timestep,
            **condition.added or {},
            return_dict=False,
        )[0]
        return predicted
