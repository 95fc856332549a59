"""Models with random weights and pairs to train them on, for measuring: nothing is downloaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.flow_shapes import FLOW_SHAPES, write_flow_model
from benchmarks.once import once
from benchmarks.shapes import MINIATURE, SHAPES, write_model
from data.artifacts import schemas
from data.artifacts.latents import (
    KIND,
    GroupWriter,
    LatentFormat,
    LatentSet,
)
from data.artifacts.manifest import FileEntry, Manifest, describe, part_name, write_manifest
from data.artifacts.parquet_io import read_table, write_table
from data.artifacts.texts import TextFormat, TextSet, read_set
from data.devices import choose_device
from data.distributed import Rank
from data.families.text import find_text
from data.families.vae import find_vae, latent_shape
from data.images import Size, decode, encode_jpeg, fit_square
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import image_key, pair_key
from label.scoring.text_files import TextFiles
from label.scoring.text_writer import PromptEncoder
from label.scoring.text_writer import write_texts as encode_prompts
from label.scoring.vae_encoder import VaeEncoder
from train.config import ModelSpec, Precision, TrainSpec, ZeroSpec
from train.identity import TrainRun

WORDS = ("red", "green", "blue", "grey", "small", "large", "square", "circle")


@dataclass(frozen=True, kw_only=True)
class World:
    """A model and the size of its images."""

    name: str
    """Of its shape; `miniature` is there already."""
    resolution: int
    image: int
    """Side of the encoded images in pixels."""


WORLDS = {
    world.name: world
    for world in (
        World(name="miniature", resolution=64, image=64),
        World(name="reduced", resolution=256, image=384),
        World(name="reduced_sd3", resolution=256, image=384),
        World(name="reduced_flux", resolution=256, image=384),
        World(name="quick", resolution=64, image=80),
        World(name="quick_xl", resolution=64, image=80),
        World(name="quick_sd3", resolution=64, image=80),
        World(name="quick_flux", resolution=64, image=80),
        World(name="sd15", resolution=512, image=768),
        World(name="sdxl", resolution=1024, image=1024),
        World(name="sd35_medium", resolution=1024, image=1024),
        World(name="flux_third", resolution=1024, image=1024),
    )
}


def model_folder(world: World, root: Path) -> Path:
    """The world's diffusers folder, written with random weights when it is not there."""
    folder = root / world.name / "base"
    if world.name in FLOW_SHAPES:
        return once(folder, partial(write_flow_model, FLOW_SHAPES[world.name]))
    if world.name in SHAPES:
        return once(folder, partial(write_model, SHAPES[world.name]))
    return MINIATURE


def write_world(world: World, root: Path, pairs: int) -> tuple[Path, Path]:
    """The model's folder and that of its pairs, which have labels; what is there stays."""
    at = root / world.name
    write_pairs(at / "pairs", (Size(world.image, world.image),), pairs)
    write_labels(at / "labels", at / "pairs")
    return model_folder(world, root), at / "pairs"


def write_latents(world: World, root: Path) -> LatentSet:
    """The pairs' latents as stage one writes them by default: means in fp16."""
    form = latent_format(world, root)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = VaeEncoder(model_folder(world, root), form, device, 8)

    def encoded(image: bytes) -> bytes:
        pixels = fit_square(decode(image), world.resolution)
        return encoder([pixels])[0].cpu().numpy().tobytes()

    return _write_latents(world, root, form, encoded)


def random_latents(world: World, root: Path) -> LatentSet:
    """Latents of the same size and format without a VAE: noise, the same for every pair."""
    form = latent_format(world, root)
    noise = np.random.default_rng(0).normal(size=form.shape).astype(np.float16).tobytes()
    return _write_latents(world, root, form, lambda _: noise)


def latent_format(world: World, root: Path) -> LatentFormat:
    """The format of stage one's latents by default."""
    vae = find_vae(model_folder(world, root))
    return LatentFormat(
        vae=vae.sha256, size=world.resolution, shape=latent_shape(vae, world.resolution),
        dtype="fp16", moments=False, flip=False, compute="fp32",
    )  # fmt: skip


def _write_latents(
    world: World, root: Path, form: LatentFormat, encode: Callable[[bytes], bytes]
) -> LatentSet:
    folder = root / world.name / "latents"
    source, files = open_pairs(PairsSpec(root=str(root / world.name / "pairs"))), list[FileEntry]()
    labels = read_table(root / world.name / "labels" / part_name(0), ["pair_id"])["pair_id"]
    for shard in source.shards:
        rows = pa.concat_tables(source.read(shard)).to_pylist()
        columns: dict[str, Any] = {"pair_id": labels, "status": ["ok"] * len(rows)}
        for side in (0, 1):
            columns[f"latent_{side}"] = [encode(row[f"image_{side}"]) for row in rows]
        path = folder / part_name(shard.index)
        writer = GroupWriter(path, form.schema, form.settings)
        writer.write(pa.table(columns, schema=form.schema))
        writer.close()
        files.append(describe(path))
    return LatentSet(folder, Manifest(kind=KIND, settings=form.settings, files=files), form)


def write_texts(world: World, root: Path) -> TextSet:
    """The pairs' prompts, encoded as stage one does by default; what is there stays."""
    model, device = model_folder(world, root), choose_device("device", "auto", Rank())
    labels = read_table(root / world.name / "labels" / part_name(0), ["prompt"])
    text = find_text(model)
    form = TextFormat(family=text.family.name, encoders=text.sha256, dtype="bf16", compute="fp32")
    files = TextFiles(
        root / world.name / "texts" / form.name, form, model, text, len(labels),
        labels["prompt"].to_pylist,
    )  # fmt: skip
    if not files.is_complete():
        encode_prompts(files, PromptEncoder(files, 8), Rank(), device, None)
        files.declare_complete({}, since=0.0)
    texts = read_set(files.folder)
    assert texts is not None
    return texts


def training_run(
    world: World,
    root: Path,
    *,
    batch: int,
    micro_batch: int,
    stage: int,
    precision: Precision | None = None,
    **settings: Any,
) -> TrainRun:
    """A run on a world that was written; bf16 on a GPU and fp32 elsewhere, unless given.

    `settings` are more of `TrainSpec`.
    """
    usual = Precision.bf16 if torch.cuda.is_available() else Precision.fp32
    spec = TrainSpec(
        batch=batch, micro_batch=micro_batch, precision=precision or usual,
        zero=ZeroSpec(stage=stage),
        **{"channels_last": torch.cuda.is_available()} | settings,
    )  # fmt: skip
    at = root / world.name
    return TrainRun(
        folder=at / "train", labels=at / "labels", pairs=PairsSpec(root=str(at / "pairs")),
        model=ModelSpec(path=str(model_folder(world, root)), resolution=world.resolution),
        train=spec, seed=0, settings={},
    )  # fmt: skip


# --- pairs and their labels ----------------------------------------------------------------------


def write_pairs(root: Path, sizes: Sequence[Size], count: int) -> Path:
    """A pair file in Pick-a-Pic's schema: soft random images, a prompt for every two pairs.

    Pairs have these sizes, over and over.
    """
    if (root / "train-0.parquet").exists():
        return root
    prompts = [f"a {WORDS[i // 2 % 8]} {WORDS[i // 16 % 8]}" for i in range(count)]
    columns = {
        "caption": prompts,
        "image_0_uid": [f"u{i}" for i in range(count)],
        "image_1_uid": [f"v{i}" for i in range(count)],
        "jpg_0": [_image(2 * i, sizes[i % len(sizes)]) for i in range(count)],
        "jpg_1": [_image(2 * i + 1, sizes[i % len(sizes)]) for i in range(count)],
        "label_0": [1.0] * count,
        "label_1": [0.0] * count,
    }
    write_table(root / "train-0.parquet", pa.table(columns), row_group_rows=64)
    return root


def _image(seed: int, size: Size) -> bytes:
    """Soft blobs with a little noise: about as many bytes as a photograph."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(0, 255, (1, 3, 12, 12)).astype(np.float32))
    shape = size.height, size.width
    smooth = torch.nn.functional.interpolate(coarse, size=shape, mode="bicubic")[0]
    noisy = smooth.permute(1, 2, 0).numpy() + random.normal(0, 6, (*shape, 3))
    return encode_jpeg(noisy.clip(0, 255).astype(np.uint8))


def write_labels(folder: Path, pairs: Path) -> Path:
    """A label set in which image 0 wins every pair."""
    if (folder / "manifest.json").exists():
        return folder
    source = open_pairs(PairsSpec(root=str(pairs)))
    schema, files = schemas.labels(("clip",)), list[FileEntry]()
    for shard in source.shards:
        rows = pa.concat_tables(source.read(shard)).to_pylist()
        path = folder / part_name(shard.index)
        table = pa.Table.from_pylist([_label(shard.name, row) for row in rows], schema=schema)
        write_table(path, table, {"vote": "benchmark"})
        files.append(describe(path))
    write_manifest(folder, Manifest(kind="labels", settings={"vote": "benchmark"}, files=files))
    return folder


def _label(source: str, row: dict[str, Any]) -> dict[str, Any]:
    images = [decode(row[f"image_{side}"]) for side in (0, 1)]
    sizes = {
        f"{name}_{i}": getattr(images[i], name) for name in ("width", "height") for i in (0, 1)
    }
    key = pair_key(image_key(row["image_0"]), image_key(row["image_1"]), row["prompt"])
    return sizes | {
        "pair_id": f"{key}-0", "prompt": row["prompt"], "source": source, "row": row["row"],
        "image_0": row["uid_0"], "image_1": row["uid_1"], "winner": 0, "margin": 1,
        "decided_by": "majority", "status": "ok", "reason": "",
    }  # fmt: skip
