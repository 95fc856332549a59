"""What the benchmarks of stage one run on: pairs that repeat as Pick-a-Pic's, random networks."""

import json
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from benchmarks.random_weights import build_place
from data.devices import Dtype
from data.miniature import scenes, tokenizer
from label.config import MetricSpec

SLOTS = 1.87
"""Slots an image in Pick-a-Pic v1: 2 x 615 259 pairs over 656 480 images."""
STAYS, FAR = 0.83, 0.10
"""Chance that a pair keeps an image of the one before it, and that it shows one from long ago: the
first is what the application does; together they make `SLOTS` (the split is a guess)."""
PAIRS_A_PROMPT = 16
"""959 040 pairs over 58 960 prompts in Pick-a-Pic v2."""

LAYERS = (0, 2, 4, 6, 7)
"""Names of the aesthetic head's layers."""


def repetition(num_pairs: int, seed: int = 0) -> Iterator[tuple[int, int, int]]:
    """Prompt, left and right image of each pair, as numbers."""
    chance, images, prompts = random.Random(seed), 2, 1
    pair, prompt = deque([0, 1]), 0
    for _ in range(num_pairs):
        yield prompt, pair[0], pair[1]
        if chance.random() < STAYS:
            pair.rotate(chance.randrange(2))
        else:
            pair[0], images = images, images + 1
            again = chance.random() < 1 - 1 / (PAIRS_A_PROMPT * (1 - STAYS))
            prompt = chance.randrange(prompts) if again else prompts
            prompts += not again
        far = chance.random() < FAR
        pair[1] = chance.randrange(images) if far else images
        images += not far


def write_pairs(folder: Path, num_pairs: int, per_file: int, side: int, seed: int = 0) -> float:
    """Pick-a-Pic files of drawn JPEGs; how many slots an image fills."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, texts = list(repetition(num_pairs, seed)), scenes.prompts("train")
    numbers = {image for _, *pair in rows for image in pair}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        images = dict(zip(numbers, threads.map(lambda n: jpeg(n, side), numbers), strict=True))
    for number, first in enumerate(range(0, num_pairs, per_file)):
        part = rows[first : first + per_file]
        table = pa.table(
            {
                "caption": [f"{texts[p % len(texts)]} {p}" for p, _, _ in part],
                "jpg_0": [images[left] for _, left, _ in part],
                "jpg_1": [images[right] for _, _, right in part],
                "image_0_uid": [str(left) for _, left, _ in part],
                "image_1_uid": [str(right) for _, _, right in part],
                "label_0": [1.0] * len(part),
                "label_1": [0.0] * len(part),
                "has_label": [True] * len(part),
            }
        )
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=64)
    return 2 * num_pairs / len(numbers)


def jpeg(number: int, side: int) -> bytes:
    """A JPEG with coarse shapes and fine noise: 768 pixels a side make about 160 kB."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 32, side // 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = rng.integers(-10, 11, (side, side, 1), dtype=np.int16)
    buffer = BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


VIT_B = {"width": 768, "layers": 12, "heads": 12, "patch": 16, "side": 224}
VIT_L = {"width": 1024, "layers": 24, "heads": 16, "patch": 14, "side": 224}
VIT_H = {"width": 1280, "layers": 32, "heads": 16, "patch": 14, "side": 224}
TINY = {"width": 32, "layers": 1, "heads": 2, "patch": 32, "side": 224}


def panel(
    folder: Path,
    clip: dict[str, int],
    others: dict[str, int],
    dtype: Dtype | None = Dtype.fp32,
) -> dict[str, MetricSpec]:
    """The paper's four metrics on three random backbones; text models are small.

    CLIP and the aesthetic head share one of size `clip`; PickScore's and HPS's have the size
    `others`.
    """
    _save_hf(folder / "clip", clip)
    _save_hf(folder / "pickscore", others)
    _save_open_clip(folder / "hps", others)
    return panel_at(folder, dtype)


def panel_at(folder: Path, dtype: Dtype | None) -> dict[str, MetricSpec]:
    """The metrics of backbones that are there already; writes the aesthetic head."""
    sizes = [64, 32, 16, 8, 4, 1]
    shapes = zip(LAYERS, sizes, sizes[1:], strict=False)
    head = {f"layers.{i}.weight": torch.randn(after, before) for i, before, after in shapes}
    head |= {key.replace("weight", "bias"): torch.zeros(len(w)) for key, w in head.items()}
    save_file(head, folder / "aesthetic.safetensors")
    places: dict[str, dict[str, Any]] = {
        "hps": {"weights": f"{folder}/hps"},
        "clip": {"weights": f"{folder}/clip"},
        "pickscore": {"weights": f"{folder}/pickscore"},
        "aesthetic": {"weights": f"{folder}/clip", "head": f"{folder}/aesthetic.safetensors"},
    }
    return {name: MetricSpec(kind=name, dtype=dtype, **place) for name, place in places.items()}


def _save_hf(folder: Path, size: dict[str, int]) -> None:
    words = tokenizer.vocabulary()
    end = words[tokenizer.END]
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    ends = {"eos_token_id": end, "bos_token_id": words[tokenizer.BEGIN], "pad_token_id": end}
    config = CLIPConfig(
        text_config=text
        | ends
        | {
            "num_attention_heads": 2,
            "vocab_size": len(words),
            "max_position_embeddings": tokenizer.CONTEXT,
        },
        vision_config={
            "hidden_size": size["width"],
            "intermediate_size": 4 * size["width"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"],
            "image_size": size["side"],
            "patch_size": size["patch"],
        },
        projection_dim=64,
    )
    device, dtype = build_place()
    with device:
        model: Any = CLIPModel(config)
    model.to(dtype).save_pretrained(folder)
    tokenizer.hf_tokenizer().save_pretrained(folder)


def _save_open_clip(folder: Path, size: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vision = {
        "image_size": size["side"],
        "layers": size["layers"],
        "width": size["width"],
        "head_width": size["width"] // size["heads"],
        "patch_size": size["patch"],
    }
    text = {
        "context_length": tokenizer.CONTEXT,
        "vocab_size": len(tokenizer.vocabulary()),
        "width": 128,
        "heads": 2,
        "layers": 2,
    }
    model = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    config = json.dumps({"model_cfg": model, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(config)
    tokenizer.write_open_clip_merges(folder / "merges.txt.gz")
    device, dtype = build_place()
    with device:
        state = CLIP(**model).to(dtype).state_dict()
    save_file(
        {key: value.cpu().contiguous() for key, value in state.items()},
        folder / "open_clip_model.safetensors",
    )
