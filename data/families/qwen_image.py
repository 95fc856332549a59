"""Qwen-Image: a transformer over packed latents, and a vision-language model for the text."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int

from data.families.flux import pack, unpack
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
from data.models.latent_scale import NORMALISATION, LatentScale, latent_scale
from data.models.rectified_flow import EULER
from data.models.vae_config import latent_channels

TOKENS = 512
"""Tokens of a prompt at most: the default of the pipeline's call and of diffusers' script."""
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What frames a prompt: the pipeline's."""
BEFORE = 34
"""Tokens of the template before the prompt, which the transformer does not get."""
FORMS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of transformers that are given images, layers or a guidance."""


class QwenImage(FlowFamily):
    """Qwen-Image (Wu et al. 2025); not its editing, layered and control forms."""

    pipeline = "QwenImagePipeline"
    parts = {
        "tokenizer": "Qwen2Tokenizer",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "scheduler": "",
    }
    patch = 2
    schedulers = (EULER,)

    def check(self, what: str, config: ModelConfig) -> None:
        """Refuse transformers of the other forms, and VAEs of images with transparency."""
        super().check(what, config)
        for name in FORMS:
            if config.denoiser.get(name):
                raise ModelError(
                    f"{what} has a transformer with {name}=true, as the forms have that are given "
                    "images or layers; text-image pairs cannot train it: give Qwen-Image itself"
                )
        if (channels := config.vae.get("input_channels", 3)) != 3:
            raise ModelError(
                f"{what} has a VAE with input_channels={channels}, as that of the layered form; "
                "images here have 3: give Qwen-Image itself"
            )

    def latent_channels(self, config: ModelConfig) -> int:
        """A quarter of the transformer's, which takes 2 x 2 latents as one."""
        return int(config.denoiser.get("in_channels", 64)) // self.patch**2

    def latent_scale(self, what: str, vae: Json) -> LatentScale:
        """By mean and standard deviation of each channel, which the file must have."""
        given = {"scaling_factor": 1.0, "latent_channels": latent_channels(vae), **vae}
        return latent_scale(what, self.pipeline, given, NORMALISATION, required=True)

    def vae_in_fp32(self, vae: Json) -> bool:
        """Never: diffusers' pipeline and training script run it as the rest."""
        return False

    def text_settings(self, config: ModelConfig) -> Json:
        """The tokens that are kept, and what frames a prompt."""
        return {"tokens": TOKENS, "template": TEMPLATE, "before": BEFORE}

    def pipeline_options(self, prompts: int, guidance: float) -> dict[str, Any]:
        """The pipeline compares with a negative prompt where it is given one."""
        if guidance <= 1:
            return {"true_cfg_scale": 1.0}
        return {"true_cfg_scale": guidance, "negative_prompt": [" "] * prompts}

    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """The last layer's states of the prompt in its template, without the template's beginning.

        An empty prompt is a blank, as the negative prompt of diffusers' examples.
        """
        output, mask = encoders["text_encoder"].masked(
            [TEMPLATE.format(prompt or " ") for prompt in prompts],
            {"output_hidden_states": True, "logits_to_keep": 1},
            max_length=TOKENS + BEFORE,
            padding=True,
        )
        return PromptEmbeds.masked(output.hidden_states[-1], mask, TOKENS, BEFORE)

    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The text up to the longest one's end, and a mask where others are shorter."""
        import torch

        assert text.length is not None
        longest = int(text.length.max())
        states = text.states[:, :longest]
        mask = torch.arange(longest, device=text.length.device) < text.length[:, None]
        if mask.all():
            return Condition(states)
        return Condition(states, {"encoder_hidden_states_mask": mask.long()})

    def predict(
        self, denoiser: Callable[..., Any], noisy: Latents, timestep: Tensor, condition: Condition
    ) -> Latents:
        """The velocity; the timestep is divided by 1000 in the latents' format, as the pipeline's.

        An image is a video of one frame, whose patches have positions about its middle.
        """
        rows, columns = noisy.shape[2] // self.patch, noisy.shape[3] // self.patch
        packed = denoiser(
            hidden_states=pack(noisy),
            timestep=timestep.to(noisy.dtype) / 1000,
            encoder_hidden_states=condition.states,
            **condition.added or {},
            img_shapes=[[(1, rows, columns)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(packed, rows, columns)

    def guide(self, conditional: Latents, empty: Latents, scale: float) -> Latents:
        """As usual, then each patch made as long as the prompt's own prediction of it."""
        guided = pack(super().guide(conditional, empty, scale))
        length = pack(conditional).norm(dim=-1, keepdim=True)
        rows, columns = conditional.shape[2] // self.patch, conditional.shape[3] // self.patch
        return unpack(guided * (length / guided.norm(dim=-1, keepdim=True)), rows, columns)

    def pipeline_latents(self, noise: Latents) -> Tensor:
        """The pipeline takes packed latents."""
        return pack(noise)


FAMILY = QwenImage()
