"""Tiny flow-matching models with random weights, a writer for each family."""

from pathlib import Path
from typing import Any

from tests.helpers_train import SIDE, text_config, tiny_tokenizer

CHANNELS, T5_WIDTH = 16, 40
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_t5() -> Any:
    """Wider than both CLIPs together, or their states would be cut to its width."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=60, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def tiny_t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    words = [(letter, -3.0) for letter in LETTERS] + [(f"▁{letter}", -2.5) for letter in LETTERS]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


def flow_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=CHANNELS, norm_num_groups=4,
        sample_size=SIDE, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip


def flow_scheduler(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def write_sd3(folder: Path, *, t5: bool = True, dual: bool = True) -> Path:
    """An SD3.5 medium (`dual`: with its second attention and normalised queries) or SD3."""
    import torch
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection as Clip

    torch.manual_seed(0)
    options = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if dual else {}
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=12 + 10, pos_embed_max_size=8,
        **options,
    )  # fmt: skip
    with torch.no_grad():  # new ones are 0, and the model would predict nothing
        transformer.proj_out.weight.normal_(0, 0.3)
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow_scheduler(shift=3.0), vae=flow_vae(),
        text_encoder=Clip(text_config(num_hidden_layers=2, projection_dim=12)),
        text_encoder_2=Clip(
            text_config(num_hidden_layers=2, projection_dim=10, hidden_act="gelu", hidden_size=12)
        ),
        text_encoder_3=tiny_t5() if t5 else None,
        tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(pad_token="a"),
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_flux(folder: Path, *, guidance: bool = True) -> Path:
    """FLUX.1 dev, or (without guidance, and with a static shift of 1) schnell."""
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=T5_WIDTH, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    FluxPipeline(
        transformer=transformer, vae=flow_vae(),
        scheduler=flow_scheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        text_encoder=CLIPTextModel(text_config()), text_encoder_2=tiny_t5(),
        tokenizer=tiny_tokenizer(), tokenizer_2=tiny_t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_qwen_tokenizer(template: bool = True) -> Any:
    """Single letters, with the marks and the template of a chat."""
    from transformers import Qwen2Tokenizer

    vocab = {letter: index for index, letter in enumerate([*LETTERS, "Ġ", "Ċ"])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], eos_token="<|im_end|>", model_max_length=512,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    frame = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = frame if template else None
    return tokenizer


def write_z_image(folder: Path) -> Path:
    """Z-Image; its padding of text and image is used, since 16 patches are not a multiple of 32."""
    import torch
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=(8, 4, 4), axes_lens=(600, 16, 16),
    )  # fmt: skip
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    text = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    ZImagePipeline(
        transformer=transformer, vae=flow_vae(), scheduler=flow_scheduler(shift=3.0),
        text_encoder=Qwen3Model(text), tokenizer=tiny_qwen_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_gemma_tokenizer() -> Any:
    """Single letters after a beginning."""
    from transformers import GemmaTokenizer

    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocab = {token: index for index, token in enumerate([*marks, *LETTERS, "▁"])}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=8192, add_bos_token=True)


def write_sana(folder: Path) -> Path:
    """Sana, with the scheduler that it is published with."""
    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline
    from diffusers import SanaTransformer2DModel as Transformer
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    transformer = Transformer(
        in_channels=CHANNELS, out_channels=CHANNELS, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=8, sample_size=32,
    )  # fmt: skip
    blocks: dict[str, Any] = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (16, 16),
            "qkv_multiscales": ((), (5,)), "layers_per_block": (1, 1),
        }.items()
    }  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=8, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.4, **blocks,
    )  # fmt: skip
    text = Gemma2Config(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    SanaPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=Gemma2Model(text),
        tokenizer=tiny_gemma_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_qwen_image(folder: Path) -> Path:
    """Qwen-Image, whose autoencoder is one of videos and whose scheduler shifts by size."""
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as TextEncoder

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=16,
        num_attention_heads=1, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.06] * CHANNELS, latents_std=[2 / 3] * CHANNELS,
    )  # fmt: skip
    narrow = {"hidden_size": 16, "intermediate_size": 16}
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4}
    text = Qwen2_5_VLConfig(
        text_config=narrow | {
            "vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "rope_parameters": rope, "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config=narrow | {"depth": 1, "num_heads": 1, "out_hidden_size": 16},
    )  # fmt: skip
    scheduler = flow_scheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )
    QwenImagePipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=TextEncoder(text),
        tokenizer=tiny_qwen_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


SIDES = {"sana": 32}
"""Sides of images where the pipeline takes no smaller ones."""

WRITERS = {
    "sd3": write_sd3,
    "sd3_without_t5": lambda folder: write_sd3(folder, t5=False, dual=False),
    "flux": write_flux,
    "flux_schnell": lambda folder: write_flux(folder, guidance=False),
    "z_image": write_z_image,
    "sana": write_sana,
    "qwen_image": write_qwen_image,
}
