"""Aspect buckets in stage one's latents and in whole runs of stage two."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from data.artifacts.atomic import ShardError
from data.artifacts.latents import LatentFormat, LatentSet
from data.artifacts.parquet_io import read_table, write_table
from data.families.vae import find_vae, latent_shape
from data.images import Size, decode, fit
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from tests.helpers_ranks import Place
from tests.helpers_train import SIDE, image, write_base, write_labels, write_pairs
from tests.test_train_latents import write_set
from train.config import BucketKind, BucketSpec, ModelSpec, Precision
from train.dpo.draws import DrawRule
from train.dpo.step import draws_of, encode
from train.loader.dataset import decided_pairs
from train.loader.latent_source import latents_of
from train.loader.loader import PairStream, StreamPlan
from train.loader.order import Position
from train.models.components import load_components

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = BucketSpec(kind=BucketKind.free, step=8, aspect=4.0, unit=4).sizes(SIDE)
SHAPES = (Size(16, 16), Size(60, 20), Size(16, 16), Size(12, 30), Size(16, 16))
"""Of the pairs' images: squares, 3:1 and 2:5."""
SETTINGS = ("buckets=free", "train.buckets.step=8", "train.buckets.aspect=4",
            "train.buckets.unit=4", "train.precision=fp32", "train.validation.share=0.6",
            "train.validation.every=3")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("buckets")
    write_base(root / "base")
    write_pairs(root / "pairs", shapes=SHAPES)
    write_labels(root / "labels", root / "pairs")
    return root


@pytest.fixture(scope="module")
def latent_set(root: Path) -> LatentSet:
    vae = find_vae(root / "base")
    return write_set(root, LatentFormat(
        vae=vae.sha256, size=SIDE, shape=latent_shape(vae, SIDE), dtype="fp32", moments=True,
        flip=False, compute="fp32", buckets=SIZES,
    ))  # fmt: skip


def stream(root: Path, latents: LatentSet | None, rank: int = 0, world_size: int = 1) -> PairStream:
    source = open_pairs(PairsSpec(root=str(root / "pairs")))
    pairs = decided_pairs(root / "labels", source)
    plan = StreamPlan(seed=1, batch=8, micro_batch=4, window=2, sizes=SIZES, unit=4, rank=rank,
                      world_size=world_size)  # fmt: skip
    payload = latents_of(latents, pairs, mirrored=False) if latents else None
    return PairStream(pairs, source, plan, payload)


def test_sizes_are_tall_square_and_wide():
    assert [str(size) for size in SIZES] == ["8x32", "16x16", "32x8"]


def test_rows_say_their_size_and_hold_latents_of_it(latent_set: LatentSet):
    """Pairs 0, 1 and 3 of the file are square, 3:1 and 2:5."""
    assert latent_set.form.buckets == SIZES
    assert str(latent_set.form) == (
        "3 sizes, 4x8x8 and less, fp32 mean and std, up to 2 KiB an image"
    )
    table = pq.read_table(latent_set.folder / "part-00000.parquet")
    rows = [table.slice(row, 1).to_pylist()[0] for row in (0, 1, 3)]
    assert [(row["width"], row["height"]) for row in rows] == [(16, 16), (32, 8), (8, 32)]
    assert {len(row["latent_1"]) for row in rows} == {2 * 4 * 8 * 8 * 4}


def test_a_step_is_given_the_same_latents_from_images_and_from_files(
    root: Path, latent_set: LatentSet
):
    """Also with the noise of its size; images are those of the pairs, cut to the size."""
    spec = ModelSpec(path=str(root / "base"), resolution=SIDE)
    components = load_components(spec, Precision.fp32, torch.device("cpu"))
    rule = DrawRule(seed=0, num_timesteps=1000, latent_shape=components.latent_shape)
    batches = [stream(root, latents).batches(Position()) for latents in (None, latent_set)]
    numbers = {row: i for i, row in enumerate(
        [pair for part in ("part-00000.parquet", "part-00001.parquet")
         for pair in read_table(root / "labels" / part)["pair_id"].to_pylist()]
    )}  # fmt: skip
    cuts = set()
    for images, latents in islice(zip(*batches, strict=True), 8):
        assert images.pair_ids == latents.pair_ids
        draws = draws_of(images, rule)
        height, width = images.cut.height // 2, images.cut.width // 2
        assert draws.noise.shape == (4, 4, height, width)
        right, given = (encode(batch, components, draws)[0] for batch in (images, latents))
        assert right.shape == (8, 4, height, width)
        assert torch.equal(right, given)
        number = numbers[images.pair_ids[0]]  # odd pairs are won by image 1
        content = image(2 * number + number % 2, SHAPES[number % len(SHAPES)])
        assert torch.equal(images.winner[0], torch.tensor(fit(decode(content), images.cut)))
        cuts.add(images.cut)
    assert cuts == set(SIZES)


def test_latents_of_another_size_are_refused(root: Path, latent_set: LatentSet, tmp_path: Path):
    shutil.copytree(latent_set.folder, tmp_path / latent_set.folder.name)
    other = LatentSet(tmp_path / latent_set.folder.name, latent_set.manifest, latent_set.form)
    path = other.folder / "part-00000.parquet"
    table = read_table(path)
    turned = table.rename_columns({"width": "height", "height": "width"}).select(table.column_names)
    write_table(path, turned)
    first, *others = latent_set.manifest.files
    files = [replace(first, bytes=path.stat().st_size), *others]
    other = replace(other, manifest=replace(latent_set.manifest, files=files))
    with pytest.raises(ShardError, match=r"row 1 of .* has latents of 8x32 pixels, but .* 32x8"):
        stream(root, other)


@pytest.mark.ranks
def test_a_resumed_run_has_the_bits_of_a_straight_one(root: Path, latent_set: LatentSet):
    """With held-out pairs of all sizes; the last third is trained again."""
    place, folder = Place(root), root / "runs/run/train"
    shutil.copytree(root / "latents", root / "runs/run/latents")
    printed = place.train("run", *SETTINGS)
    assert "buckets: 3 of 3 sizes have pairs (16x16 " in printed
    assert "as squares of 16x16 they would have " in printed
    assert f"images: latents in {root}/runs/run/latents" in printed
    straight = place.weights("run")
    assert 0 <= place.journal("run")[-1]["validation_accuracy"] <= 1
    assert "16 pixels, buckets=free" in (folder / "pipeline/README.md").read_text()
    for name in ("pipeline", "step-0000006"):
        shutil.rmtree(folder / name)
    assert "resuming after step 4" in place.train("run", *SETTINGS)
    assert place.weights("run") == straight
