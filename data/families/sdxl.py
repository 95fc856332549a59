"""SDXL: a UNet that is told the image's sizes, two CLIP text encoders, DDPM's process."""

from collections.abc import Sequence

from jaxtyping import Float, Int

from data.devices import to_device
from data.families.sd1 import StableDiffusion
from data.images import Size, central_crop
from data.models.family import Condition, Encoders, Json, ModelConfig, PromptEmbeds, Tensor
from data.models.latent_scale import NORMALISATION, LatentScale, latent_scale

ZEROS = "force_zeros_for_empty_prompt"
"""In `model_index.json`: whether "no prompt" is zeros."""


class StableDiffusionXL(StableDiffusion):
    """SDXL (Podell et al. 2023), and others of its shape."""

    pipeline = "StableDiffusionXLPipeline"
    parts = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "",
    }
    addition = "text_time"

    def latent_scale(self, what: str, vae: Json) -> LatentScale:
        """By the factor, and by mean and standard deviation where the VAE has them."""
        return latent_scale(what, self.pipeline, vae, NORMALISATION)

    def vae_in_fp32(self, vae: Json) -> bool:
        """It overflows in half precision, unless its file says that it was repaired."""
        return bool(vae.get("force_upcast", True))

    def text_settings(self, config: ModelConfig) -> Json:
        """What an empty prompt is."""
        return {ZEROS: config.index.get(ZEROS, True)}

    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """Both last-but-one layers side by side (section 2.1); pooled is the second's projection.

        "No prompt" is zeros instead of an encoded empty text where the folder says so.
        """
        import torch

        outputs = [
            encoders[part](prompts, output_hidden_states=True) for part in self.text_encoders
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[1].text_embeds
        if config.index.get(ZEROS, True):  # the pipeline's default
            empty = to_device(torch.tensor([not prompt for prompt in prompts]), states.device)
            states = states.masked_fill(empty.view(-1, 1, 1), 0)
            pooled = pooled.masked_fill(empty.view(-1, 1), 0)
        return PromptEmbeds(states, pooled)

    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The text, its pooled form, and each image's own time ids."""
        assert text.pooled is not None
        return Condition(text.states, {"text_embeds": text.pooled, "time_ids": time_ids(size, cut)})


def time_ids(size: Int[Tensor, "image 2"], cut: Size) -> Float[Tensor, "image 6"]:
    """SDXL's size and crop conditioning (Podell et al. 2023, section 2.2).

    Original height and width; top and left of the crop, counted in pixels of the resized image
    (the convention that SDXL was trained with); target height and width. They stay float32: in
    bf16 sizes above 256 would be rounded. For a mirrored image the left edge is that before
    mirroring, which is off by at most one pixel because crops are central.
    """
    import torch

    rows = []
    for height, width in size.tolist():
        crop = central_crop(Size(width, height), cut)
        rows.append([height, width, crop.top, crop.left, cut.height, cut.width])
    return torch.tensor(rows, dtype=torch.float32).view(-1, 6)


FAMILY = StableDiffusionXL()
