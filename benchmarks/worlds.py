"""Models with random weights and pairs to train them on, for measuring: nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data import tables
from data.images import encode_jpeg
from data.pairs import PairsSpec, image_key, open_pairs, pair_key
from data.shards import FileEntry, Manifest, describe, part_name, write_manifest, write_table
from train.config import ModelSpec, Precision, TrainSpec, ZeroSpec
from train.identity import TrainRun

MINIATURE = Path("data/miniature/weights/base")
WORDS = ("red", "green", "blue", "grey", "small", "large", "square", "circle")


@dataclass(frozen=True, kw_only=True)
class World:
    """A model and the size of its pictures; with `folder` it is there already."""

    name: str
    resolution: int
    picture: int
    """Side of the encoded pictures in pixels."""
    folder: Path | None = None
    widths: tuple[int, ...] = ()
    """Channels of the UNet's levels; the innermost has no attention, as in SD1.x."""
    vae: tuple[int, ...] = ()
    """Channels of the VAE's levels; three halvings."""
    text: int = 0
    """Width of the text states."""
    text_layers: int = 2
    head: int = 8


WORLDS = {
    "miniature": World(name="miniature", resolution=64, picture=64, folder=MINIATURE),
    "reduced": World(
        name="reduced", resolution=256, picture=384,
        widths=(64, 128, 256, 256), vae=(24, 48, 96, 96), text=256, text_layers=4,
    ),
    "quick": World(
        name="quick", resolution=64, picture=80,
        widths=(32, 64), vae=(8, 8, 8, 8), text=32,
    ),
    "sd15": World(
        name="sd15", resolution=512, picture=768,
        widths=(320, 640, 1280, 1280), vae=(128, 256, 512, 512), text=768, text_layers=12,
    ),
}  # fmt: skip
"""`reduced` has the shape of SD1.x at a fifth of its width, 32 x 32 latents; `sd15` is SD1.5's."""


def model_folder(world: World, root: Path) -> Path:
    """The world's diffusers folder, written with random weights when it is not there."""
    if world.folder is not None:
        return world.folder
    folder = root / world.name / "base"
    if not folder.exists():
        _write_model(world, folder)
    return folder


def _write_model(world: World, folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE, subfolder="tokenizer", model_max_length=77)
    down = ["CrossAttnDownBlock2D"] * (len(world.widths) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(world.widths) - 1)
    unet = UNet2DConditionModel(
        sample_size=world.resolution // 8, block_out_channels=world.widths, layers_per_block=2,
        down_block_types=tuple(down), up_block_types=tuple(up), cross_attention_dim=world.text,
        attention_head_dim=world.head,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=world.vae, down_block_types=("DownEncoderBlock2D",) * len(world.vae),
        up_block_types=("UpDecoderBlock2D",) * len(world.vae), layers_per_block=2,
        latent_channels=4, norm_num_groups=min(32, world.vae[0]), sample_size=world.resolution,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=world.text, intermediate_size=4 * world.text,
        num_hidden_layers=world.text_layers, num_attention_heads=world.text // 16,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "unet": unet,
        "scheduler": scheduler, "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def write_world(world: World, root: Path, pairs: int) -> tuple[Path, Path]:
    """The model's folder and that of its pairs, which have labels; what is there stays."""
    at = root / world.name
    write_pairs(at / "pairs", world.picture, pairs)
    write_labels(at / "labels", at / "pairs", world.picture)
    return model_folder(world, root), at / "pairs"


def training_run(
    world: World,
    root: Path,
    *,
    batch: int,
    micro_batch: int,
    stage: int,
    precision: Precision | None = None,
) -> TrainRun:
    """A run on a world that was written; bf16 on a GPU and fp32 elsewhere, unless told."""
    usual = Precision.bf16 if torch.cuda.is_available() else Precision.fp32
    spec = TrainSpec(
        batch=batch, micro_batch=micro_batch, precision=precision or usual,
        zero=ZeroSpec(stage=stage), channels_last=torch.cuda.is_available(),
    )  # fmt: skip
    at = root / world.name
    return TrainRun(
        folder=at / "train", labels=at / "labels", pairs=PairsSpec(root=str(at / "pairs")),
        model=ModelSpec(path=str(model_folder(world, root)), resolution=world.resolution),
        train=spec, seed=0, settings={},
    )  # fmt: skip


# --- pairs and their labels ----------------------------------------------------------------------


def write_pairs(root: Path, side: int, count: int) -> Path:
    """A pair file in Pick-a-Pic's schema: soft random pictures, a prompt for every two pairs."""
    if root.exists():
        return root
    prompts = [f"a {WORDS[i // 2 % 8]} {WORDS[i // 16 % 8]}" for i in range(count)]
    columns = {
        "caption": prompts,
        "image_0_uid": [f"u{i}" for i in range(count)],
        "image_1_uid": [f"v{i}" for i in range(count)],
        "jpg_0": [_picture(2 * i, side) for i in range(count)],
        "jpg_1": [_picture(2 * i + 1, side) for i in range(count)],
        "label_0": [1.0] * count,
        "label_1": [0.0] * count,
    }
    write_table(root / "train-0.parquet", pa.table(columns), row_group_rows=64)
    return root


def _picture(seed: int, side: int) -> bytes:
    """Soft blobs with a little noise: about as many bytes as a photograph."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(0, 255, (1, 3, 12, 12)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[0]
    noisy = smooth.permute(1, 2, 0).numpy() + random.normal(0, 6, (side, side, 3))
    return encode_jpeg(noisy.clip(0, 255).astype(np.uint8))


def write_labels(folder: Path, pairs: Path, side: int) -> Path:
    """A label set in which image 0 wins every pair."""
    if folder.exists():
        return folder
    source = open_pairs(PairsSpec(root=str(pairs)))
    schema, files = tables.labels(("clip",)), list[FileEntry]()
    for shard in source.shards:
        found = pa.concat_tables(source.read(shard)).to_pylist()
        path = folder / part_name(shard.index)
        table = pa.Table.from_pylist(
            [_label(shard.name, row, side) for row in found], schema=schema
        )
        write_table(path, table, {"vote": "benchmark"})
        files.append(describe(path))
    write_manifest(folder, Manifest(kind="labels", settings={"vote": "benchmark"}, files=files))
    return folder


def _label(source: str, row: dict[str, Any], side: int) -> dict[str, Any]:
    sizes = dict.fromkeys(("width_0", "height_0", "width_1", "height_1"), side)
    key = pair_key(image_key(row["image_0"]), image_key(row["image_1"]), row["prompt"])
    return sizes | {
        "pair_id": f"{key}-0", "prompt": row["prompt"], "source": source, "row": row["row"],
        "image_0": row["uid_0"], "image_1": row["uid_1"], "winner": 0, "margin": 1,
        "decided_by": "majority", "status": "ok", "reason": "",
    }  # fmt: skip
