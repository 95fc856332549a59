"""FLUX.1 dev and schnell: a transformer over packed latents, CLIP for the pooled text, and T5."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int

from data.images import Size
from data.models.family import (
    Condition,
    Encoders,
    FlowFamily,
    Json,
    Latents,
    ModelConfig,
    PromptEmbeds,
    Tensor,
)
from data.models.rectified_flow import EULER

T5_TOKENS = 512
"""Tokens of a prompt for T5: the pipeline's default."""
GUIDANCE = 3.5
"""What a distilled transformer is told in training: the default of diffusers' scripts."""


class Flux(FlowFamily):
    """FLUX.1 dev, which is told a guidance, and FLUX.1 schnell, which is not."""

    pipeline = "FluxPipeline"
    parts = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5Tokenizer",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "",
    }
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    patch = 2
    schedulers = (EULER,)
    is_guided = False

    def latent_channels(self, config: ModelConfig) -> int:
        """A quarter of the transformer's, which takes 2 x 2 latents as one."""
        return int(config.denoiser.get("in_channels", 64)) // self.patch**2

    def vae_in_fp32(self, vae: Json) -> bool:
        """Never: diffusers' pipeline and training scripts run it as the rest."""
        return False

    def guidance(self, config: ModelConfig) -> float | None:
        """The scripts' default where the transformer has an embedding for it."""
        return GUIDANCE if config.denoiser.get("guidance_embeds") else None

    def text_settings(self, config: ModelConfig) -> Json:
        """T5's tokens."""
        return {"t5_tokens": T5_TOKENS}

    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """T5's states; pooled is CLIP's end token after its norm."""
        pooled = encoders["text_encoder"](prompts).pooler_output
        return PromptEmbeds(encoders["text_encoder_2"](prompts, length=T5_TOKENS)[0], pooled)

    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The text, its pooled form, and the guidance if the transformer is told one."""
        import torch

        assert text.pooled is not None
        added = {"pooled_projections": text.pooled}
        if guidance is not None:
            added["guidance"] = torch.full((len(text.states),), guidance)
        return Condition(text.states, added)

    def predict(
        self, denoiser: Callable[..., Any], noisy: Latents, timestep: Tensor, condition: Condition
    ) -> Latents:
        """The velocity; the timestep is divided by 1000 in the latents' format, as the pipeline's.

        The positions of patches are (0, row, column), those of text are zeros.
        """
        assert condition.added is not None
        rows, columns = noisy.shape[2] // self.patch, noisy.shape[3] // self.patch
        packed = denoiser(
            pack(noisy),
            encoder_hidden_states=condition.states,
            pooled_projections=condition.added["pooled_projections"],
            timestep=timestep.to(noisy.dtype) / 1000,
            guidance=condition.added.get("guidance"),
            txt_ids=condition.states.new_zeros(condition.states.shape[1], 3),
            img_ids=positions(rows, columns, noisy),
            return_dict=False,
        )[0]
        return unpack(packed, rows, columns)

    def pipeline_latents(self, noise: Latents) -> Tensor:
        """The pipeline takes packed latents."""
        return pack(noise)


def pack(
    latents: Latents,
) -> Float[Tensor, "image patch channel_4"]:
    """Make one token of 2 x 2 latents: channel by channel, in each row by row."""
    return (
        latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )


def unpack(packed: Float[Tensor, "image patch channel_4"], rows: int, columns: int) -> Latents:
    """Undo `pack`."""
    images, _, width = packed.shape
    patches = packed.reshape(images, rows, columns, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(images, width // 4, 2 * rows, 2 * columns)


def positions(rows: int, columns: int, like: Tensor) -> Float[Tensor, "patch 3"]:
    """(0, row, column) of each patch, row by row, in the format and on the device of `like`."""
    import torch

    ids = like.new_zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)
    return ids.flatten(0, 1)


FAMILY = Flux()
