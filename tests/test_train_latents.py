"""Training from latents and texts is training from images: same pairs, same draws, same weights."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.artifacts.atomic import ShardError
from data.artifacts.latents import KIND as LATENTS
from data.artifacts.latents import LatentFormat, LatentSet, read_set
from data.artifacts.parquet_io import read_table, write_table
from data.distributed import Rank
from data.families.vae import find_vae, latent_shape
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairSource
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.panel import Panel
from label.scoring.score_sets import ScoreSets, plan
from label.scoring.scoring_pass import Clock
from label.scoring.shard_scorer import ScoringTools, score_shards
from label.scoring.vae_encoder import VaeEncoder
from tests.helpers_ranks import Place, make_place
from tests.helpers_texts import text_files, write_texts
from tests.helpers_train import SIDE, SQUARE, write_base, write_labels, write_pairs
from train.config import CacheUse, ModelSpec, Precision
from train.dpo.draws import DrawRule
from train.dpo.step import draws_of, encode
from train.loader.dataset import decided_pairs
from train.loader.latent_source import latents_of
from train.loader.loader import PairStream, StreamPlan
from train.loader.order import Position
from train.loader.source_choice import LatentsNeeded, advice, choose_source, find_latents
from train.models.components import ModelComponents, load_components

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, labels, and latents and texts that lose nothing."""
    root = tmp_path_factory.mktemp("latents")
    write_base(root / "base")
    write_pairs(root / "pairs", sizes=(70, 16), group=20)
    write_labels(root / "labels", root / "pairs")
    write_latents(root)
    write_texts(text_files(root, root / "base", root / "texts"))
    return root


def write_latents(root: Path, **change: object) -> LatentSet:
    """The set in `root/latents`: fp32 moments of both orientations, or as changed."""
    vae = find_vae(root / "base")
    given = {"dtype": "fp32", "moments": True, "flip": True, "compute": "fp32"} | change
    form = LatentFormat(vae=vae.sha256, size=SIDE, shape=latent_shape(vae, SIDE), **given)
    return write_set(root, form)


def write_set(root: Path, form: LatentFormat) -> LatentSet:
    """The set of a format in `root/latents`, as stage one writes it."""
    pairs = open_pairs(PairsSpec(root=str(root / "pairs")))
    sets = ScoreSets(root / "scores", pairs.shards, {}, form)
    encoder = VaeEncoder(root / "base", form, CPU, 8)
    with DecodePool(0) as decoder:
        tools = ScoringTools(
            pairs, Panel({}), sets, decoder, Batch(8), Clock(), 0,
            encoder,
        )  # fmt: skip
        score_shards(plan(sets, Rank()), tools)
    sets.declare_complete({}, since=0.0)
    latents = read_set(sets.folder_of(LATENTS))
    assert latents is not None
    return latents


@pytest.fixture(scope="module")
def latent_set(root: Path) -> LatentSet:
    (folder,) = (root / "latents").iterdir()
    latents = read_set(folder)
    assert latents is not None
    return latents


@pytest.fixture(scope="module")
def components(root: Path) -> ModelComponents:
    return load_components(ModelSpec(path=str(root / "base"), resolution=SIDE), Precision.fp32, CPU)


@pytest.fixture(scope="module")
def source(root: Path) -> PairSource:
    return open_pairs(PairsSpec(root=str(root / "pairs")))


def stream(
    root: Path,
    source: PairSource,
    latent_set: LatentSet | None,
    *,
    flip: bool = False,
    **change: int,
) -> PairStream:
    given = {"seed": 1, "batch": 8, "micro_batch": 4, "window": 2, "sizes": (SQUARE,)}
    pairs = decided_pairs(root / "labels", source)
    latents = latents_of(latent_set, pairs, mirrored=flip) if latent_set else None
    return PairStream(pairs, source, StreamPlan(**given | change), latents)


def rule_of(components: ModelComponents, *, flip: bool) -> DrawRule:
    return DrawRule(seed=0, num_timesteps=1000, latent_shape=components.latent_shape, flip=flip)


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_is_given_the_same_latents_to_the_last_bit(
    root: Path,
    source: PairSource,
    latent_set: LatentSet,
    components: ModelComponents,
    flip: bool,
    world: int,
) -> None:
    for rank in range(world):
        change = {"rank": rank, "world_size": world}
        plain = stream(root, source, None, **change)
        cached = stream(root, source, latent_set, flip=flip, **change)
        both = (islice(one.batches(Position()), 20) for one in (plain, cached))
        flipped = 0
        for images, latents in zip(*both, strict=True):
            assert images.pair_ids == latents.pair_ids
            assert images.prompts == latents.prompts
            assert images.epochs == latents.epochs
            draws = draws_of(images, rule_of(components, flip=flip))
            flipped += int(draws.flip.sum())
            right, _ = encode(images, components, draws)
            given, _ = encode(latents, components, draws)
            assert torch.equal(right, given)
            assert right.stride() == given.stride()  # or the UNet would round them differently
        assert (flipped > 0) == flip


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_the_mean_in_half_precision_differs_by_its_rounding(
    root: Path,
    source: PairSource,
    components: ModelComponents,
    tmp_path: Path,
    dtype: str,
    bound: float,
) -> None:
    for name in ("base", "pairs", "labels"):
        (tmp_path / name).symlink_to(root / name)
    rough = write_latents(tmp_path, dtype=dtype, moments=False, flip=False)
    everything = np.arange(30)
    images = stream(root, source, None).pick(everything)
    latents = stream(root, source, rough).pick(everything)
    draws = draws_of(images, rule_of(components, flip=False))
    draws = replace(draws, posterior=torch.zeros_like(draws.posterior))
    right, _ = encode(images, components, draws)
    given, _ = encode(latents, components, draws)
    assert given.dtype == torch.float32
    assert ((given - right).abs() <= 1.01 * bound * right.abs() + 1e-6).all()
    assert not torch.equal(given, right)


def test_without_the_vae_its_settings_are_still_known(
    root: Path, components: ModelComponents
) -> None:
    spec = ModelSpec(path=str(root / "base"), resolution=SIDE)
    bare = load_components(spec, Precision.fp32, CPU, with_vae=False)
    assert bare.latent_shape(SQUARE) == components.latent_shape(SQUARE)
    assert bare.vae.config.scaling_factor == components.vae.config.scaling_factor
    assert all(parameter.is_meta for parameter in bare.vae.parameters())
    moments, posterior = (torch.randn(1, *axes, *bare.latent_shape(SQUARE)) for axes in ((2,), ()))
    assert torch.equal(
        bare.sample_posterior(moments, posterior), components.sample_posterior(moments, posterior)
    )


def test_memory_is_stated_and_kept_while_the_shards_grow(
    root: Path, latent_set: LatentSet, tmp_path: Path
) -> None:
    """Ten times the files: the same bound, and never more in memory than it says."""
    stated, peaks = [], []
    for count in (2, 20):
        place = tmp_path / str(count)
        write_pairs(place / "pairs", sizes=(24,) * count, group=12)
        (place / "base").symlink_to(root / "base")
        write_labels(place / "labels", place / "pairs")
        latents = write_latents(place, dtype="fp16", moments=False, flip=False)
        many = open_pairs(PairsSpec(root=str(place / "pairs")))
        one = stream(place, many, latents, window=1)
        most = 0
        for _ in islice(one.batches(Position()), 2 * one.epoch_batches * 2):
            tables = [future.result() for future in set(one._open.values())]
            most = max(most, sum(t.nbytes for table in tables for t in table.values()))
        stated.append(one.window_bytes)
        peaks.append(most)
        assert most <= one.window_bytes
    assert stated[0] == stated[1]
    assert peaks[1] <= peaks[0]


# --- which images ------------------------------------------------------------------------------


def need(root: Path, **change: object) -> LatentsNeeded:
    given = {
        "folder": root / "latents",
        "model": root / "base",
        "resolution": SIDE,
        "buckets": (),
        "flip": True,
    }
    return LatentsNeeded(**given | change)


def test_auto_takes_what_fits_and_says_so(root: Path, latent_set: LatentSet) -> None:
    chosen = choose_source(CacheUse.auto, need(root), None)
    assert chosen.latents == latent_set
    assert chosen.description.startswith(
        f"images: latents in {latent_set.folder} (4x8x8 fp32 mean and std"
    )
    assert chosen.settings == {
        "identity": latent_set.manifest.identity, "dtype": "fp32", "moments": True,
    }  # fmt: skip


def test_never_takes_none(root: Path) -> None:
    chosen = choose_source(CacheUse.never, need(root), None)
    assert chosen.latents is None
    assert chosen.settings is None
    assert "encoded by the VAE in every step (train.latents=never)" in chosen.description


def test_what_does_not_fit_is_said_and_refused_where_it_was_asked(
    root: Path, latent_set: LatentSet, tmp_path: Path
) -> None:
    other = write_base(tmp_path / "other" / "base")
    shutil.copytree(latent_set.folder, tmp_path / "latents" / latent_set.folder.name)
    (tmp_path / "latents" / latent_set.folder.name / "manifest.json").unlink()
    cases = [
        (need(root, folder=tmp_path / "none"), "there are no latents in"),
        (
            need(root, resolution=32),
            f"has {latent_set.folder.name}, but this VAE, resolution and buckets are",
        ),
        (need(root, folder=tmp_path / "latents"), "are not complete"),
    ]
    assert find_vae(other).sha256 == find_vae(root / "base").sha256  # the same seed
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    cases.append((need(root, model=other), "but this VAE, resolution and buckets are"))
    for needed, why in cases:
        chosen = choose_source(CacheUse.auto, needed, None)
        assert chosen.latents is None
        assert why in chosen.description
        with pytest.raises(ShardError, match="train.latents=always, but"):
            choose_source(CacheUse.always, needed, None)


def test_a_run_is_told_what_latents_would_spare() -> None:
    assert advice(100, 8, 800) == ""
    assert advice(100, 8, 400).startswith("each image is decoded and encoded 2.0 times in this")
    assert "latents=model" in advice(100, 8, 400)


def test_flips_need_mirrored_latents(root: Path, tmp_path: Path) -> None:
    for name in ("base", "pairs", "labels"):
        (tmp_path / name).symlink_to(root / name)
    write_latents(tmp_path, flip=False)
    assert isinstance(find_latents(need(tmp_path, flip=False)), LatentSet)
    with pytest.raises(ShardError, match=r"train.flip=true .* has no mirrored ones"):
        choose_source(CacheUse.always, need(tmp_path), None)
    assert "has no mirrored ones" in choose_source(CacheUse.auto, need(tmp_path), None).description


def test_a_run_goes_on_with_what_it_began_with(root: Path, tmp_path: Path) -> None:
    assert choose_source(CacheUse.auto, need(root), {"latents": None}).latents is None
    assert (
        choose_source(CacheUse.auto, need(root), {}).latents is None
    )  # of before there were latents
    assert choose_source(CacheUse.auto, need(root), {"latents": {"identity": "x"}}).latents
    with pytest.raises(ShardError, match="this run began with latents, but there are no latents"):
        choose_source(CacheUse.auto, need(root, folder=tmp_path), {"latents": {"identity": "x"}})


# --- what can be wrong ---------------------------------------------------------------------------


@pytest.fixture
def damaged(root: Path, latent_set: LatentSet, tmp_path: Path) -> LatentSet:
    folder = shutil.copytree(latent_set.folder, tmp_path / latent_set.folder.name)
    return replace(latent_set, folder=Path(folder))


def test_a_missing_or_torn_file_is_named(
    root: Path, source: PairSource, damaged: LatentSet
) -> None:
    path = damaged.folder / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ShardError, match=r"part-00001.parquet has another size"):
        stream(root, source, damaged)
    path.unlink()
    with pytest.raises(ShardError, match=r"part-00001.parquet is missing.*train.latents=never"):
        stream(root, source, damaged)


def test_a_flipped_bit_is_noticed_when_it_is_read(
    root: Path, source: PairSource, damaged: LatentSet
) -> None:
    path = damaged.folder / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    one = stream(root, source, damaged, flip=True)
    with pytest.raises(ShardError, match=r"part-00000.parquet cannot be read"):
        list(islice(one.batches(Position()), 2 * one.epoch_batches))


def test_latents_of_other_pairs_are_noticed(
    root: Path, source: PairSource, latent_set: LatentSet, damaged: LatentSet
) -> None:
    path = damaged.folder / "part-00000.parquet"
    table = read_table(path)
    turned = table.take(list(range(1, table.num_rows)) + [0])
    write_table(path, turned)
    files = [
        replace(file, bytes=(damaged.folder / file.name).stat().st_size)
        for file in latent_set.manifest.files
    ]
    other = replace(damaged, manifest=replace(latent_set.manifest, files=files))
    with pytest.raises(ShardError, match="is of other pairs than the labels"):
        stream(root, source, other)
    fewer = replace(
        latent_set, manifest=replace(latent_set.manifest, files=latent_set.manifest.files[:1])
    )
    with pytest.raises(ShardError, match="has no part-00001.parquet"):
        stream(root, source, fewer)


def test_a_decided_pair_without_latents_is_named(
    root: Path, source: PairSource, latent_set: LatentSet, damaged: LatentSet
) -> None:
    path = damaged.folder / "part-00000.parquet"
    table = read_table(path)
    column = ["not_finite_latent"] + table["status"].to_pylist()[1:]
    table = table.set_column(1, "status", [column])
    write_table(path, table)
    files = [
        replace(file, bytes=(damaged.folder / file.name).stat().st_size)
        for file in latent_set.manifest.files
    ]
    other = replace(damaged, manifest=replace(latent_set.manifest, files=files))
    with pytest.raises(ShardError, match=r"has a winner but no latents \(not_finite_latent\)"):
        stream(root, source, other)


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Runs on this module's pairs."""
    place = make_place(tmp_path_factory.mktemp("place"))
    shutil.rmtree(place.root / "pairs")
    (place.root / "pairs").symlink_to(root / "pairs")
    return place


def with_latents(place: Place, root: Path, run: str) -> str:
    (place.root / "runs" / run).mkdir(parents=True)
    for name in ("latents", "texts"):
        shutil.copytree(root / name, place.root / "runs" / run / name)
    return run


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world", "flip"), [(2, 1, True), (3, 2, False)])
def test_weights_are_the_same_with_and_without_latents(
    place: Place, root: Path, stage: int, world: int, flip: bool
) -> None:
    args = (f"zero=stage{stage}", f"train.flip={str(flip).lower()}", "train.precision=fp32")
    plain, cached = f"plain-{stage}", with_latents(place, root, f"cached-{stage}")
    said = place.train(plain, *args, world=world)
    assert "images: from the pair files, encoded by the VAE in every step: there are no" in said
    assert "each image is decoded and encoded" not in said  # not one epoch
    assert "prompts: encoded in every step: there are no texts in" in said
    said = place.train(cached, *args, world=world)
    assert "images: latents in " in said
    assert "prompts: texts in " in said
    assert place.weights(plain) == place.weights(cached)
    waits = [line["data_wait_s"] for line in place.journal(cached)]
    assert all(wait >= 0 for wait in waits)


@pytest.mark.ranks
def test_a_finished_run_needs_its_latents_no_more_but_one_under_way_does(
    place: Place, root: Path
) -> None:
    run = with_latents(place, root, "spent")
    place.train(run, "train.flip=true", "train.precision=fp32")
    shutil.rmtree(place.root / "runs" / run / "latents")
    again = place.train(run, "train.flip=true", "train.precision=fp32")
    assert "training is done" in again
    shutil.rmtree(place.folder(run) / "pipeline")
    said = place.fail(run, "train.flip=true", "train.precision=fp32")
    assert "this run began with latents, but there are no latents in" in said
    said = place.fail(run, "train.flip=true", "train.precision=fp32", "train.latents=never")
    assert "latents.identity: found" in said
