"""Sana: a transformer with linear attention over small latents, a language model for text."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int

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
from data.models.forward_process import Prediction, refuse
from data.models.latent_scale import LatentScale, latent_scale
from data.models.rectified_flow import SCHEDULERS, FlowProcess

TOKENS = 300
"""Tokens that are kept of a prompt: the pipeline's default."""
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
        "descriptions suitable for image generation. Evaluate the level of detail in the user "
        "prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
        "textures, and spatial relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly "
        "without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
        "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
        "flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
        "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
        "double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including "
        "any additional commentary or evaluations:",
        "User Prompt: ",
    )
)
"""What the language model reads before a prompt (Xie et al. 2024, section 2.3): the pipeline's."""


class Sana(FlowFamily):
    """Sana and Sana 1.5; not Sana Sprint, which has another process."""

    pipeline = "SanaPipeline"
    parts = {
        "tokenizer": "GemmaTokenizer",
        "text_encoder": "Gemma2Model",
        "transformer": "SanaTransformer2DModel",
        "vae": "AutoencoderDC",
        "scheduler": "",
    }
    lora_targets = ("to_q", "to_k", "to_v")
    schedulers = (*SCHEDULERS, "DPMSolverMultistepScheduler")

    def check(self, what: str, config: ModelConfig) -> None:
        """Refuse what the pipeline would run otherwise than its published models."""
        super().check(what, config)
        usual = {
            "patch_size": 1,
            "timestep_scale": 1,
            "guidance_embeds": False,
            "out_channels": self.latent_channels(config),
        }
        for name, value in usual.items():
            if config.denoiser.get(name) not in (None, value):
                raise ModelError(
                    f"{what} has a transformer with {name}={config.denoiser[name]}; those that can "
                    f"be aligned have {value}"
                )

    def process(
        self, what: str, index: Json, scheduler: Json, prediction: Prediction | None = None
    ) -> FlowProcess:
        """Rectified flow; the pipeline names no image size to a scheduler that asks for one."""
        process = super().process(what, index, scheduler, prediction)
        if process.dynamic:
            raise refuse(what, "use_dynamic_shifting", True, "false")
        return process

    def latent_channels(self, config: ModelConfig) -> int:
        """Those of the transformer's input."""
        return int(config.denoiser.get("in_channels", 32))

    def latent_scale(self, what: str, vae: Json) -> LatentScale:
        """By the factor alone."""
        return latent_scale(what, self.pipeline, {"scaling_factor": 1.0, **vae})

    def vae_in_fp32(self, vae: Json) -> bool:
        """As diffusers' training script keeps it."""
        return True

    def text_settings(self, config: ModelConfig) -> Json:
        """The tokens that are kept, and what stands before a prompt."""
        return {"tokens": TOKENS, "instruction": INSTRUCTION}

    def pipeline_options(self, prompts: int, guidance: float) -> dict[str, Any]:
        """Without its choice of another size, to which it would not fit our latents."""
        return {"guidance_scale": guidance, "use_resolution_binning": False}

    def encode(
        self, encoders: Encoders, prompts: Sequence[str], config: ModelConfig
    ) -> PromptEmbeds:
        """The last layer's states: the first token's, and those after the instruction's.

        An empty prompt is read without the instruction, as the pipeline's negative prompt is.
        """
        import torch

        parts, order = [], []
        for instruction in ("", INSTRUCTION):
            rows = [row for row, text in enumerate(prompts) if bool(text) == bool(instruction)]
            if rows:
                texts = [prompts[row] for row in rows]
                parts.append(_encode(encoders["text_encoder"], texts, instruction))
                order += rows
        states, mask = (torch.cat(kind) for kind in zip(*parts, strict=True))
        length = mask.sum(1).cpu()
        embeds = PromptEmbeds(states, length=length)
        return embeds.rows(torch.tensor(order).argsort().to(states.device))

    def condition(
        self, text: PromptEmbeds, size: Int[Tensor, "image 2"], cut: Size, guidance: float | None
    ) -> Condition:
        """The text, and which of its tokens are no padding."""
        import torch

        assert text.length is not None
        places = torch.arange(text.states.shape[1], device=text.length.device)
        mask = places < text.length[:, None]
        return Condition(text.states, {"encoder_attention_mask": mask.long()})


def _encode(
    encoder: Any, prompts: Sequence[str], instruction: str
) -> tuple[Float[Tensor, "prompt token width"], Int[Tensor, "prompt token"]]:
    """States and mask of prompts after an instruction, of which one token is kept."""
    before = len(encoder.tokenizer.encode(instruction)) - 2 if instruction else 0
    output, mask = encoder.masked(
        [instruction + prompt.lower().strip() for prompt in prompts],
        max_length=before + TOKENS,
        padding="max_length",
        padding_side="right",
    )
    kept = [0, *range(1 - TOKENS, 0)]
    return output[0][:, kept], mask[:, kept]


FAMILY = Sana()
