"""Z-Image and its Turbo: one transformer over text and image, and a language model for text."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int

from data.images import Size
from data.models.family import (
    Condition,
    Encoders,
    FlowFamily,
    Json,
    Latents,
    ModelConfig,
    ModelError,
    PromptEmbeds,
    Tensor,
)
from data.models.rectified_flow import EULER

TOKENS = 512
"""Tokens of a prompt with its template at most: the pipeline's default."""


class ZImage(FlowFamily):
    """Z-Image (Z-Image Team 2025), and its distilled form."""

    pipeline = "ZImagePipeline"
    parts = {
        "tokenizer": "Qwen2Tokenizer",
        "text_encoder": "Qwen3Model",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "",
    }
    patch = 2
    schedulers = (EULER,)

    def check(self, what: str, config: ModelConfig) -> None:
        """Refuse transformers that are given images, and other patches than the pipeline's."""
        super().check(what, config)
        patches = [config.denoiser.get(f"all_{name}") for name in ("patch_size", "f_patch_size")]
        for name, usual, value in zip(("patch_size", "f_patch_size"), (2, 1), patches, strict=True):
            if value is not None and usual not in value:
                raise ModelError(
                    f"{what} has a transformer with all_{name}={value}; the pipeline takes {usual}"
                )
        if config.denoiser.get("siglip_feat_dim") is not None:
            raise ModelError(
                f"{what} has a transformer with siglip_feat_dim, which is given images; text-image "
                "pairs cannot train it: give its text-to-image base"
            )

    def check_resolution(self, setting: str, resolution: int, config: ModelConfig) -> None:
        """Refuse also images beyond the transformer's positions."""
        super().check_resolution(setting, resolution, config)
        positions = min(config.denoiser.get("axes_lens", (1024, 512, 512))[1:])
        if resolution > (most := int(positions) * self.patch * config.vae_factor):
            raise ModelError(
                f"{setting}={resolution} is more than {most}, for which the transformer has "
                "positions (axes_lens); lower it"
            )

    def latent_channels(self, config: ModelConfig) -> int:
        """Those of the transformer's input."""
        return int(config.denoiser.get("in_channels", 16))

    def vae_in_fp32(self, vae: Json) -> bool:
        """Never: diffusers' pipeline and training scripts run it as the rest."""
        return False

    def text_settings(self, config: ModelConfig) -> Json:
        """The language model's tokens."""
        return {"tokens": TOKENS}

    def pipeline_options(self, prompts: int, guidance: float) -> dict[str, Any]:
        """The pipeline counts a guidance scale from 0: prompt + scale (prompt - empty)."""
        return {"guidance_scale": guidance - 1}

    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """The last-but-one layer's states of the prompt in the tokenizer's chat template."""
        encoder = encoders["text_encoder"]
        texts = [
            encoder.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]
        output, mask = encoder.masked(
            texts, {"output_hidden_states": True}, max_length=TOKENS, padding="max_length"
        )
        return PromptEmbeds.masked(output.hidden_states[-2], mask, TOKENS)

    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The text; positions of the image begin where its own text ends, so padding counts."""
        assert text.length is not None
        return Condition(text.states, lengths=tuple(text.length.tolist()))

    def predict(
        self, denoiser: Callable[..., Any], noisy: Latents, timestep: Tensor, condition: Condition
    ) -> Latents:
        """The velocity, of which the transformer predicts the negative; its time is 0 at noise.

        Images and texts are lists, an image's only frame is its second dimension.
        """
        import torch

        assert condition.lengths is not None
        texts = zip(condition.states, condition.lengths, strict=True)
        predicted = denoiser(
            list(noisy.unsqueeze(2)),
            (1000 - timestep) / 1000,
            [states[:length] for states, length in texts],
            return_dict=False,
        )[0]
        return -torch.stack(list(predicted)).squeeze(2)


FAMILY = ZImage()
