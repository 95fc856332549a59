"""A tiny Stable Diffusion, pairs in Pick-a-Pic's schema, and their labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.artifacts import schemas
from data.artifacts.manifest import FileEntry, Manifest, describe, part_name, write_manifest
from data.artifacts.parquet_io import write_table
from data.images import Size, encode_png, size_of
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import image_key, pair_key

SIDE = 16
SQUARE = Size(SIDE, SIDE)
METRICS = ("clip", "hps")
WORDS = ("red", "green", "blue", "grey")


def write_base(folder: Path, prediction: str = "epsilon") -> Path:
    """A StableDiffusionPipeline folder with random weights: 16x16 images, 8x8x4 latents."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer, text, vae = tiny_tokenizer(), text_config(), tiny_vae()
    unet = UNet(
        sample_size=SIDE // 2, block_out_channels=(16,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=tiny_scheduler(prediction), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_sdxl_base(folder: Path, *, zeros: bool = True, upcast: bool = True) -> Path:
    """The same of StableDiffusionXLPipeline, with a second, wider text encoder."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet(
        sample_size=SIDE // 2, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        cross_attention_dim=40, attention_head_dim=(2, 4), norm_num_groups=8,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=upcast), unet=unet, scheduler=tiny_scheduler("epsilon"),
        text_encoder=CLIPTextModel(text_config(num_hidden_layers=3)),
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(num_hidden_layers=2, hidden_size=24, projection_dim=12, hidden_act="gelu")
        ),
        tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(pad_token="a"),
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def opened(base: Path) -> Any:
    """A folder as training opens it."""
    from train.config import ModelSpec
    from train.models.base_model import open_model

    return open_model(ModelSpec(path=str(base), resolution=SIDE))


def tiny_tokenizer(**options: object) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    ends = [f"{letter}</w>" for letter in letters]
    tokens = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12, **options)


def text_config(**options: object) -> Any:
    from transformers import CLIPTextConfig

    defaults = {
        "vocab_size": 54, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 52,
        "eos_token_id": 53, "pad_token_id": 53,
    }  # fmt: skip
    return CLIPTextConfig(**defaults | options)


def tiny_vae(**options: object) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        sample_size=SIDE, scaling_factor=0.5, **options,
    )  # fmt: skip


def tiny_scheduler(prediction: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        clip_sample=False, set_alpha_to_one=False, prediction_type=prediction,
    )  # fmt: skip


def image(seed: int, shape: Size = SQUARE) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (shape.height, shape.width, 3), np.uint8)
    return encode_png(pixels)


def write_pairs(
    root: Path,
    sizes: tuple[int, ...] = (20, 16),
    group: int = 6,
    shapes: tuple[Size, ...] = (SQUARE,),
) -> Path:
    """Pair files of these many rows in Pick-a-Pic's schema, whose images have these shapes."""
    first = 0
    for index, rows in enumerate(sizes):
        ids = range(first, first + rows)
        table = pa.table(
            {
                "caption": [f"a {WORDS[i % 4]} cat" for i in ids],
                "image_0_uid": [f"u{i}" for i in ids],
                "image_1_uid": [f"v{i}" for i in ids],
                "jpg_0": [image(2 * i, shapes[i % len(shapes)]) for i in ids],
                "jpg_1": [image(2 * i + 1, shapes[i % len(shapes)]) for i in ids],
                "label_0": [1.0] * rows,
                "label_1": [0.0] * rows,
            }
        )
        write_table(root / f"train-{index}.parquet", table, row_group_rows=group)
        first += rows
    return root


def write_labels(folder: Path, root: Path, undecided: int = 7) -> Path:
    """A label set over the pairs: every `undecided`-th has no winner, odd pairs' winner is 1."""
    schema = schemas.labels(METRICS)
    files: list[FileEntry] = []
    number = 0
    source = open_pairs(PairsSpec(root=str(root)))
    for shard in source.shards:
        rows = []
        for pair in pa.concat_tables(source.read(shard)).to_pylist():
            key = pair_key(image_key(pair["image_0"]), image_key(pair["image_1"]), pair["prompt"])
            both = [size_of(pair[f"image_{side}"]) or SQUARE for side in (0, 1)]
            winner = None if number % undecided == undecided - 1 else number % 2
            rows.append(
                dict.fromkeys(schema.names)
                | {
                    "pair_id": f"{key}-0", "prompt": pair["prompt"], "source": shard.name,
                    "row": pair["row"], "image_0": pair["uid_0"], "image_1": pair["uid_1"],
                    "width_0": both[0].width, "height_0": both[0].height,
                    "width_1": both[1].width, "height_1": both[1].height,
                    "winner": winner, "margin": 1 + number % 3, "decided_by": "majority",
                    "status": "ok", "reason": "",
                }
            )  # fmt: skip
            number += 1
        path = folder / part_name(shard.index)
        write_table(path, pa.Table.from_pylist(rows, schema=schema), {"vote": "majority"})
        files.append(describe(path))
    write_manifest(folder, Manifest(kind="labels", settings={"vote": "majority"}, files=files))
    return folder
