"""Stable Diffusion 3 and 3.5: a transformer, two CLIP text encoders and, optionally, T5."""

from collections.abc import Sequence

from jaxtyping import Int

from data.images import Size
from data.models.family import (
    Condition,
    Encoders,
    FlowFamily,
    Json,
    ModelConfig,
    ModelError,
    PromptEmbeds,
    Tensor,
)

T5_TOKENS = 256
"""Tokens of a prompt for T5: the pipeline's default, also where there is no T5."""


class StableDiffusion3(FlowFamily):
    """SD3 medium, SD3.5 medium and large (Esser et al. 2024)."""

    pipeline = "StableDiffusion3Pipeline"
    parts = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5Tokenizer",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "",
    }
    optional = ("tokenizer_3", "text_encoder_3")
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    patch = 2

    def check(self, what: str, config: ModelConfig) -> None:
        """Refuse half a T5, besides models that are given an image."""
        super().check(what, config)
        if config.has("tokenizer_3") != config.has("text_encoder_3"):
            raise ModelError(
                f"{what} has only one of text_encoder_3 and tokenizer_3; give both, or set both to "
                "[null, null] in model_index.json to do without T5"
            )

    def check_resolution(self, setting: str, resolution: int, config: ModelConfig) -> None:
        """Refuse also images beyond the transformer's grid of positions."""
        super().check_resolution(setting, resolution, config)
        most = int(config.denoiser.get("pos_embed_max_size", 96)) * self.patch * config.vae_factor
        if resolution > most:
            raise ModelError(
                f"{setting}={resolution} is more than {most}, for which the transformer has "
                "positions (pos_embed_max_size); lower it"
            )

    def latent_channels(self, config: ModelConfig) -> int:
        """Those of the transformer's input."""
        return int(config.denoiser.get("in_channels", 16))

    def vae_in_fp32(self, vae: Json) -> bool:
        """As diffusers' training scripts keep it."""
        return True

    def text_settings(self, config: ModelConfig) -> Json:
        """T5's tokens, and the width of the zeros in its place."""
        return {"t5_tokens": T5_TOKENS, "width": config.denoiser.get("joint_attention_dim", 4096)}

    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """Both CLIPs' last-but-one layers side by side, then T5's states (section 4.1, Fig. 2).

        CLIP's states are filled up with zeros to T5's width. Without T5 its states are zeros.
        Pooled are both CLIPs' projections.
        """
        import torch
        from torch.nn.functional import pad

        clips = [
            encoders[part](prompts, output_hidden_states=True)
            for part in ("text_encoder", "text_encoder_2")
        ]
        clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        if config.has("text_encoder_3"):
            t5 = encoders["text_encoder_3"](prompts, length=T5_TOKENS)[0]
        else:
            width = int(config.denoiser.get("joint_attention_dim", 4096))
            t5 = clip.new_zeros(len(prompts), T5_TOKENS, width)
        states = torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return PromptEmbeds(states, torch.cat([output.text_embeds for output in clips], dim=-1))

    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The text and its pooled form."""
        assert text.pooled is not None
        return Condition(text.states, {"pooled_projections": text.pooled})


FAMILY = StableDiffusion3()
