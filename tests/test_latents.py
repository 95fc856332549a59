"""Latents written beside the scores: the right numbers, each image once, bad rows in place."""

import json
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from conf.job import settings
from data.artifacts.atomic import ShardError
from data.artifacts.fingerprints import Fingerprints
from data.artifacts.latents import KIND as LATENTS
from data.artifacts.latents import LatentFormat, read_set
from data.artifacts.manifest import read_manifest, verify
from data.artifacts.parquet_io import read_table
from data.artifacts.schemas import latents as schema_of
from data.devices import Dtype
from data.distributed import Rank
from data.families.vae import find_vae, latent_shape
from data.images import UnreadableImageError, decode, fit_square
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairSource
from label.run import latent_format
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.panel import Panel
from label.scoring.score_sets import FACTS, ScoreSets, plan
from label.scoring.scoring_pass import Clock
from label.scoring.shard_scorer import ScoringTools, score_shards
from label.scoring.vae_encoder import VaeEncoder
from tests import helpers_label as tiny
from tests.helpers_train import SIDE, write_base
from tests.test_conf import job

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSource:
    root = tiny.build_pairs(tmp_path_factory.mktemp("pairs"), num_files=2, per_file=70)
    return open_pairs(PairsSpec(root=str(root)))


def form_of(base: Path, **change: object) -> LatentFormat:
    vae = find_vae(base)
    given = {"dtype": "fp32", "moments": True, "flip": True, "compute": "fp32"} | change
    return LatentFormat(vae=vae.sha256, size=SIDE, shape=latent_shape(vae, SIDE), **given)


def write(folder: Path, pairs: PairSource, encoder: VaeEncoder) -> ScoreSets:
    """Latents alone, into `folder/latents`."""
    sets = ScoreSets(folder / "scores", pairs.shards, {}, encoder.form)
    with DecodePool(0) as decoder:
        tools = ScoringTools(
            pairs, Panel({}), sets, decoder, Batch(8), Clock(), 0,
            encoder,
        )  # fmt: skip
        score_shards(plan(sets, Rank()), tools)
    sets.declare_complete({}, since=0.0)
    return sets


def numbers(blob: bytes, form: LatentFormat) -> Tensor:
    latent = torch.frombuffer(bytearray(blob), dtype=Dtype(form.dtype).torch)
    return latent.view(1 + form.moments, *form.shape)


def encoded_alone(base: Path, content: bytes, *, mirror: bool) -> Tensor:
    """Mean and deviation by diffusers' own VAE, one image at a time."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").eval()
    pixels = torch.tensor(fit_square(decode(content), SIDE)).permute(2, 0, 1)[None]
    signed = (pixels.flip(3) if mirror else pixels) / 127.5 - 1
    with torch.no_grad():
        result = vae.encode(signed).latent_dist
    return torch.stack([result.mean, result.std], 1)[0]


# --- the numbers ---------------------------------------------------------------------------------


def test_rows_hold_what_the_vae_says_of_both_images_and_their_mirror_images(
    base: Path, pairs: PairSource, tmp_path: Path
) -> None:
    sets = write(tmp_path, pairs, VaeEncoder(base, form_of(base), CPU, 8))
    form, shard = form_of(base), pairs.shards[1]
    source = next(iter(pairs.read(shard, batch_rows=999))).to_pylist()
    table = read_table(sets.path(LATENTS, shard))
    facts = read_table(sets.path(FACTS, shard))
    assert table.schema.remove_metadata().equals(schema_of(form.bytes, flip=True))
    assert table["pair_id"].equals(facts["pair_id"])
    assert table["status"].equals(facts["status"])
    assert {"ok", "unreadable_image", "empty_prompt"} == set(table["status"].to_pylist())
    for row, pair in zip(table.to_pylist(), source, strict=True):
        for side in (0, 1):
            blobs = row[f"latent_{side}"], row[f"flipped_{side}"]
            if row["status"] != "ok":
                assert blobs == (None, None)
            elif pair["row"] % 9 == 0 or pair["row"] > 69:
                for blob, mirror in zip(blobs, (False, True), strict=True):
                    expected = encoded_alone(base, pair[f"image_{side}"], mirror=mirror)
                    torch.testing.assert_close(numbers(blob, form), expected, rtol=1e-5, atol=1e-6)
    upright, flipped = (numbers(table[n][0].as_py(), form)[0] for n in ("latent_0", "flipped_0"))
    assert not torch.allclose(upright.flip(2), flipped, atol=1e-3)  # which is why both are kept


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_rounding_is_what_the_format_says_and_no_more(
    base: Path, pairs: PairSource, tmp_path: Path, dtype: str, bound: float
) -> None:
    exact = form_of(base, flip=False, moments=False)
    rough = form_of(base, flip=False, moments=False, dtype=dtype)
    assert rough.bytes == exact.bytes // 2
    tables = []
    for form in (exact, rough):
        sets = write(tmp_path / form.dtype, pairs, VaeEncoder(base, form, CPU, 8))
        tables.append(read_table(sets.path(LATENTS, pairs.shards[0])))
    for one, two in zip(*(table["latent_0"].to_pylist() for table in tables), strict=True):
        right, result = numbers(one, exact), numbers(two, rough).float()
        assert ((result - right).abs() <= bound * right.abs() + 1e-7).all()


def test_files_are_streamable_by_small_row_groups(
    base: Path, pairs: PairSource, tmp_path: Path
) -> None:
    sets = write(tmp_path, pairs, VaeEncoder(base, form_of(base), CPU, 8))
    metadata = pq.read_metadata(sets.path(LATENTS, pairs.shards[0]))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [64, 6]
    for column in range(2, 6):
        chunk = metadata.row_group(0).column(column)
        assert chunk.compression == "UNCOMPRESSED"
        assert chunk.statistics is None
        assert not chunk.has_dictionary_page
    result = read_set(sets.folder_of(LATENTS))
    assert result is not None
    assert result.form == form_of(base)
    assert result.manifest.rows == sum(shard.rows for shard in pairs.shards)
    verify(result.folder, result.manifest)


class Watched(VaeEncoder):
    """Notes what it is given, and can be made to fail."""

    most = 1000
    """Images that there is memory for."""
    spoilt: int | None = None
    """The image, counted from the first, whose latents overflow."""

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("no room")
        result = super().__call__(images).clone()
        given = [image.tobytes() for image in images]
        self.seen = getattr(self, "seen", [])
        for number, image in enumerate(given):
            if image not in self.seen:
                self.seen.append(image)
            if self.seen.index(image) == self.spoilt:
                result[number, 3] = 0x7F  # little-endian fp32: an infinity or no number
                result[number, 2] = 0x80
        self.calls = [*getattr(self, "calls", []), len(images)]
        return result


def test_each_distinct_image_is_encoded_once(base: Path, pairs: PairSource, tmp_path: Path) -> None:
    encoder = Watched(base, form_of(base, flip=False), CPU, 8)
    write(tmp_path, pairs, encoder)
    distinct = set()
    for shard in pairs.shards:
        table = next(iter(pairs.read(shard, batch_rows=999)))
        contents = {c for side in (0, 1) for c in table[f"image_{side}"].to_pylist() if c}
        distinct |= {content for content in contents if readable(content)}
    again = 8  # the first batch is computed twice, to see that places do not matter
    assert len(distinct) <= sum(encoder.calls) - again <= 1.2 * len(distinct) + 8
    assert sum(encoder.calls) < 0.7 * 2 * sum(shard.rows for shard in pairs.shards)


def readable(content: bytes) -> bool:
    try:
        decode(content)
    except UnreadableImageError:
        return False
    return True


def test_out_of_memory_halves_the_batch_and_writes_the_same(
    base: Path, pairs: PairSource, tmp_path: Path
) -> None:
    encoder = Watched(base, form_of(base, flip=False), CPU, 8)
    encoder.most = 3
    halved = write(tmp_path / "halved", pairs, encoder)
    assert encoder.batch.size == 2
    plain = write(tmp_path / "plain", pairs, VaeEncoder(base, form_of(base, flip=False), CPU, 2))
    path = halved.path(LATENTS, pairs.shards[0])
    assert path.read_bytes() == plain.path(LATENTS, pairs.shards[0]).read_bytes()


def test_latents_that_are_not_finite_are_a_status_of_their_rows(
    base: Path, pairs: PairSource, tmp_path: Path
) -> None:
    encoder = Watched(base, form_of(base, flip=False), CPU, 8)
    encoder.spoilt = 2  # it is in the pairs 1 and 2
    sets = write(tmp_path, pairs, encoder)
    table = read_table(sets.path(LATENTS, pairs.shards[0])).to_pylist()
    bad = [i for i, row in enumerate(table) if row["status"] == "not_finite_latent"]
    assert bad == [1, 2]
    assert all(table[i]["latent_0"] is None and table[i]["latent_1"] is None for i in bad)


@pytest.mark.parametrize(
    ("pipeline", "upcast", "compute"),
    [
        ("StableDiffusionPipeline", None, "fp16"),  # SD1.5's config does not say
        ("StableDiffusionPipeline", True, "fp16"),  # as diffusers saves it
        ("StableDiffusionXLPipeline", None, "fp32"),
        ("StableDiffusionXLPipeline", True, "fp32"),
        ("StableDiffusionXLPipeline", False, "fp16"),  # repaired
        (None, None, "fp32"),  # the VAE alone
    ],
)
def test_only_sdxls_vae_runs_in_fp32_whatever_is_set(
    base: Path, tmp_path: Path, pipeline: str | None, upcast: bool | None, compute: str
) -> None:
    """In stage one as in training: the same function answers."""
    model = shutil.copytree(base, tmp_path / "model")
    if pipeline is None:
        (model / "model_index.json").unlink()
    else:
        (model / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    config = json.loads((model / "vae" / "config.json").read_text()) | {"force_upcast": upcast}
    config = {key: value for key, value in config.items() if value is not None}
    (model / "vae" / "config.json").write_text(json.dumps(config))
    built = job("latents=model", "label.latents.compute=fp16", f"model.path={model}")
    form = latent_format(built, Fingerprints())
    assert form is not None
    assert form.compute == compute


def test_latents_have_the_size_of_the_model() -> None:
    built = job("latents=model")
    form = latent_format(built, Fingerprints())
    assert form is not None
    assert form.size == built.model.resolution
    assert latent_format(job(), Fingerprints()) is None


def test_the_guide_knows_every_setting_and_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "latents.md").read_text()
    rows = dict(re.findall(r"^\| `label\.latents\.(\w+)` \| `?(\w+)`?", text, re.MULTILINE))
    spec = job().label.latents
    assert set(rows) == {field.name for field in fields(spec)}
    for name, value in rows.items():
        assert str(settings(getattr(spec, name))).lower() == value
    assert job("latents=model").label.latents.write
    assert job("train.latents=never").train.latents.value == "never"


# --- the program ---------------------------------------------------------------------------------


Run = Callable[..., tuple[int | None, str]]


def latents_too(base: Path, *more: str) -> list[str]:
    """And the encoded prompts, which are shared among ranks and resumed like latents."""
    return ["latents=model", "texts=model", f"model.path={base}", f"model.resolution={SIDE}",
            "label.latents.batch=4", *more]  # fmt: skip


@pytest.fixture(scope="module")
def nursery() -> Iterator[tiny.Nursery]:
    result = tiny.Nursery()
    yield result
    result.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.build_weights(root / "weights")
    tiny.build_pairs(root / "pairs")
    return root


@pytest.fixture
def run(nursery: tiny.Nursery, world: Path, tmp_path: Path) -> Run:
    """Run the program on the tiny world; `tmp_path/runs/tiny` is its folder."""

    def start(*more: str) -> tuple[int | None, str]:
        arguments = tiny.overrides(world / "weights", world / "pairs", tmp_path / "runs")
        return nursery.run([*arguments, *more], tmp_path / "out.txt")

    return start


@pytest.fixture(scope="module")
def both(nursery: tiny.Nursery, world: Path, base: Path) -> Path:
    """A run that wrote labels and latents in one pass."""
    arguments = tiny.overrides(world / "weights", world / "pairs", world / "both")
    status, said = nursery.run([*arguments, *latents_too(base)], world / "both.txt")
    assert status == 0, said
    assert "latents: " in said
    assert "4x8x8 fp16 mean, 0.5 KiB an image" in said
    assert re.search(r"texts: \d+ prompts of about 0 KiB, 0.00 GiB in ", said)
    assert "(12x16 bf16, 0 KiB a prompt)" in said
    return world / "both" / "tiny"


def test_latents_of_a_finished_run_come_without_scoring(
    run: Run, base: Path, both: Path, tmp_path: Path
) -> None:
    status, said = run()
    assert status == 0, said
    assert "latents: " not in said
    assert "texts: " not in said
    copy = tmp_path / "runs" / "tiny"
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.parquet")}
    manifest = (copy / "labels" / "majority" / "manifest.json").read_bytes()
    status, said = run(*latents_too(base))
    assert status == 0, said
    assert "embed 0.0 s" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (copy / "labels" / "majority" / "manifest.json").read_bytes() == manifest
    assert tiny.hashes(copy) == tiny.hashes(both)  # whether in one pass or in two
    again = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    assert run(*latents_too(base))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in again} == again


def test_rows_stand_beside_those_of_the_labels(both: Path) -> None:
    (folder,) = (both / "latents").iterdir()
    manifest = read_manifest(folder, LATENTS)
    assert manifest is not None
    assert len(manifest.sources) == len(manifest.files) == 3
    for file in manifest.files:
        table = read_table(folder / file.name)
        labels = read_table(both / "labels" / "majority" / file.name)
        assert table["pair_id"].equals(labels["pair_id"])
        assert table["status"].equals(labels["status"])


def test_a_new_metric_writes_no_latents_again(
    run: Run, base: Path, both: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "runs" / "tiny"))
    shutil.rmtree(folder / "labels")
    shutil.rmtree(folder / "scores" / "hps")
    before = {p: p.stat().st_mtime_ns for p in (folder / "latents").rglob("part-*")}
    status, said = run(*latents_too(base))
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert tiny.hashes(folder) == tiny.hashes(both)


def test_latents_of_another_format_are_refused(
    run: Run, base: Path, both: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "runs" / "tiny"))
    status, said = run(*latents_too(base, "label.latents.flip=true"))
    assert status == 2
    assert "flip: found False, now True" in said
    status, said = run(*latents_too(base, "label.texts.dtype=fp16"))
    assert status == 2
    assert "dtype: found bf16, now fp16" in said
    (built,) = (folder / "latents").iterdir()
    (built / "manifest.json").unlink()
    status, said = run(*latents_too(base, "label.latents.dtype=fp32"))
    assert status == 2
    assert "dtype: found fp16, now fp32" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.path=/no/model"], "model.path=/no/model: no such folder or file"),
        (["model.resolution=15"], "model.resolution=15 is no multiple of 2, the VAE's factor"),
        (
            ["label.latents.batch=0"],
            "label.latents.batch=0; it must be at least 1",
        ),
        (["label.latents.dtype=int8"], "label.latents.dtype"),
    ],
)
def test_mistakes_are_explained_before_anything_is_scored(
    run: Run, base: Path, more: list[str], message: str, tmp_path: Path
) -> None:
    status, said = run(*latents_too(base, *more))
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert not list((tmp_path / "runs").rglob("*.parquet"))


def test_a_model_without_a_vae_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no VAE to make latents with: no .*config.json"):
        find_vae(tmp_path)


def test_latents_cut_in_another_way_are_not_read(both: Path, tmp_path: Path) -> None:
    (built,) = (both / "latents").iterdir()
    folder = Path(shutil.copytree(built, tmp_path / built.name))
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("bilinear", "bicubic"))
    with pytest.raises(ShardError, match="images were cut by 'shortest side bicubic"):
        read_set(folder)


@pytest.mark.ranks
def test_ranks_write_the_files_that_one_writes(
    nursery: tiny.Nursery, world: Path, base: Path, both: Path, tmp_path: Path
) -> None:
    arguments = tiny.overrides(world / "weights", world / "pairs", tmp_path / "runs")
    processes = [
        nursery.start(
            [*arguments, *latents_too(base)], tmp_path / f"out-{rank}.txt",
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    statuses = [process.wait() for process in processes]
    assert statuses == [0, 0], (tmp_path / "out-0.txt").read_text()
    assert tiny.hashes(tmp_path / "runs" / "tiny") == tiny.hashes(both)


@pytest.mark.slow
def test_killed_and_repeated_ends_with_the_same_files(
    nursery: tiny.Nursery, world: Path, base: Path, both: Path, tmp_path: Path
) -> None:
    arguments = tiny.overrides(world / "weights", world / "pairs", tmp_path / "runs")
    arguments += latents_too(base)
    chance, kills = random.Random(1), 0
    for done in (1, 3, 8, 12, 16):
        process = nursery.start(arguments, tmp_path / "out.txt")
        while process.wait(chance.uniform(0, 0.01)) is None:  # until so many files are there
            if len(list((tmp_path / "runs").rglob("part-*"))) >= done:
                process.kill()
                break
        kills += process.wait() == -signal.SIGKILL
    assert kills
    status, said = nursery.run(arguments, tmp_path / "out.txt")
    assert status == 0, said
    assert tiny.hashes(tmp_path / "runs" / "tiny") == tiny.hashes(both)
    assert not list((tmp_path / "runs").rglob(".*"))
