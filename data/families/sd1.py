"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, DDPM's process."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int

from data.images import Size
from data.models.family import (
    Condition,
    Encoders,
    Family,
    Json,
    Latents,
    ModelConfig,
    ModelError,
    PromptEmbeds,
    Tensor,
)
from data.models.forward_process import DiscreteProcess, Prediction, forward_process
from data.models.latent_scale import LatentScale, latent_scale


class StableDiffusion(Family):
    """SD1.x and SD2.x."""

    pipeline = "StableDiffusionPipeline"
    parts = {
        "tokenizer": "CLIPTokenizer",
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "",
    }
    addition: str | None = None
    """The UNet's `addition_embed_type`."""

    def check(self, what: str, config: ModelConfig) -> None:
        """Refuse inpainting, depth and refiner UNets, which share the class."""
        super().check(what, config)
        added = config.denoiser.get("addition_embed_type")
        if added != self.addition or config.index.get("requires_aesthetics_score"):
            raise ModelError(
                f"{what} has a UNet with addition_embed_type={added}, but a {self.pipeline} that "
                f"can be aligned has {self.addition} and asks no aesthetics score; refiners and "
                "image-conditioned models cannot be aligned"
            )

    def process(
        self, what: str, index: Json, scheduler: Json, prediction: Prediction | None = None
    ) -> DiscreteProcess:
        """The discrete process of the scheduler."""
        return forward_process(what, index, scheduler, prediction)

    def latent_scale(self, what: str, vae: Json) -> LatentScale:
        """By the factor alone."""
        return latent_scale(what, self.pipeline, vae)

    def vae_in_fp32(self, vae: Json) -> bool:
        """Never: `force_upcast` is in its file all the same, because diffusers writes it."""
        del vae
        return False

    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """The last layer's states after their norm."""
        return PromptEmbeds(encoders["text_encoder"](prompts)[0])

    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The text alone."""
        return Condition(text.states)

    def predict(
        self, denoiser: Callable[..., Any], noisy: Latents, timestep: Tensor, condition: Condition
    ) -> Latents:
        """Noise or velocity."""
        predicted: Tensor = denoiser(
            noisy,
            timestep,
            encoder_hidden_states=condition.states,
            added_cond_kwargs=condition.added,
            return_dict=False,
        )[0]
        return predicted


FAMILY = StableDiffusion()
