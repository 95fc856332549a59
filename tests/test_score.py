import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from data.artifacts.atomic import ShardError, atomic_path, sha256_of
from data.artifacts.manifest import read_manifest, verify
from data.artifacts.parquet_io import write_table
from data.artifacts.schemas import PAIR_FACTS, SCORES, Status
from data.distributed import Rank, work_order
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairShard, PairSource
from label.config import MetricSpec
from label.metrics.backbones import HfClipBackbone
from label.metrics.cosine import CosineMetric
from label.metrics.preprocessing import process_image
from label.metrics.registry import resolve
from label.scoring import shard_scorer as module
from label.scoring.batching import Batch, Batcher
from label.scoring.decode_pool import DecodePool
from label.scoring.panel import Panel
from label.scoring.progress import PairCount
from label.scoring.score_sets import FACTS, ScoreSets, ShardTask, plan, remaining
from label.scoring.scoring_pass import Clock
from label.scoring.shard_scorer import ScoringTools, score_shards
from tests import helpers_label as tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MetricSpec]:
    result = tiny.specs(tiny.build_weights(tmp_path_factory.mktemp("weights")))
    return {name: result[name] for name in tiny.VOTERS}


@pytest.fixture(scope="module")
def panel(specs: dict[str, MetricSpec]) -> Panel:
    return Panel.load(specs, CPU)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSource:
    root = tiny.build_pairs(tmp_path_factory.mktemp("pairs"))
    return open_pairs(PairsSpec(root=str(root)))


@pytest.fixture(scope="module")
def sets_of(specs: dict[str, MetricSpec], pairs: PairSource) -> Callable[..., ScoreSets]:
    def build(folder: Path, *names: str) -> ScoreSets:
        resolved = {name: resolve(name, specs[name]).settings() for name in names or tiny.VOTERS}
        return ScoreSets(folder, pairs.shards, resolved)

    return build


def score_all(
    pairs: PairSource, panel: Panel, sets: ScoreSets, cache_bytes: int = 2**20
) -> list[ShardTask]:
    work = plan(sets, Rank())
    with DecodePool(0) as decoder:
        tools = ScoringTools(pairs, panel, sets, decoder, Batch(8), Clock(), cache_bytes)
        score_shards(work, tools)
    return work


@pytest.fixture(scope="module")
def scored(
    pairs: PairSource,
    panel: Panel,
    sets_of: Callable[..., ScoreSets],
    tmp_path_factory: pytest.TempPathFactory,
) -> ScoreSets:
    sets = sets_of(tmp_path_factory.mktemp("scored"))
    score_all(pairs, panel, sets)
    return sets


def test_every_pair_has_its_row_in_every_set(scored: ScoreSets, pairs: PairSource) -> None:
    for shard in pairs.shards:
        facts = pq.read_table(scored.path(FACTS, shard))
        assert facts.schema.remove_metadata().equals(PAIR_FACTS)
        assert facts["row"].to_pylist() == list(range(shard.rows))
        assert (
            facts["pair_id"].combine_chunks().value_counts().field("counts").to_pylist()
            == [1] * shard.rows
        )
        for name in tiny.VOTERS:
            table = pq.read_table(scored.path(name, shard))
            assert table.schema.remove_metadata().equals(SCORES)
            assert table["pair_id"].equals(facts["pair_id"])


def test_scores_are_the_panels_and_bad_rows_say_why(
    scored: ScoreSets, pairs: PairSource, panel: Panel
) -> None:
    shard = pairs.shards[1]
    source = next(iter(pairs.read(shard, batch_rows=99))).to_pylist()
    facts = pq.read_table(scored.path(FACTS, shard)).to_pylist()
    tables = {name: pq.read_table(scored.path(name, shard)).to_pylist() for name in tiny.VOTERS}
    good = [i for i, fact in enumerate(facts) if fact["status"] == "ok"]
    for side in (0, 1):
        images = [source[i][f"image_{side}"] for i in good]
        expected = panel.score(images, [source[i]["prompt"] for i in good])
        for name in tiny.VOTERS:
            results = [tables[name][i][f"score_{side}"] for i in good]
            np.testing.assert_allclose(results, expected[name], rtol=1e-5, atol=2e-6)
    bad = [(f["status"], f["reason"].split(":")[0]) for f in facts[12:18]]
    assert bad == [
        ("unreadable_image", "image 0"),
        ("unreadable_image", "image 1"),
        ("unreadable_image", "image 0"),
        ("unreadable_image", "image 0"),
        ("empty_prompt", "the prompt is empty"),
        ("empty_prompt", "the prompt is empty"),
    ]
    torn, empty = tables["clip"][12], tables["clip"][16]
    assert (torn["score_0"], torn["status_0"], torn["status_1"]) == (None, "unreadable_image", "ok")
    assert torn["score_1"] is not None
    assert (empty["score_0"], empty["status_0"]) == (None, "empty_prompt")
    assert (facts[12]["width_0"], facts[12]["width_1"], facts[12]["height_1"]) == (None, 40, 32)


def test_equal_pairs_are_numbered(scored: ScoreSets, pairs: PairSource) -> None:
    ids = pq.read_table(scored.path(FACTS, pairs.shards[1]))["pair_id"].to_pylist()
    assert ids[18][:32] == ids[0][:32]
    assert (ids[0][32:], ids[18][32:]) == ("-0", "-1")


def test_finished_shards_are_skipped_and_a_new_metric_touches_no_other(
    pairs: PairSource,
    panel: Panel,
    scored: ScoreSets,
    sets_of: Callable[..., ScoreSets],
    tmp_path: Path,
) -> None:
    some = sets_of(tmp_path, "clip", "aesthetic")
    score_all(pairs, panel, some)
    assert plan(some, Rank()) == []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    work = score_all(pairs, panel, sets_of(tmp_path))
    assert {one.sets for one in work} == {("pickscore", "hps")}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert tiny.hashes(tmp_path) == tiny.hashes(scored.folder)  # bytes do not tell the order


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 2**24])
def test_how_pairs_are_grouped_and_remembered_changes_no_byte(
    cache_bytes: int,
    pairs: PairSource,
    panel: Panel,
    scored: ScoreSets,
    sets_of: Callable[..., ScoreSets],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "READ_ROWS", 3)
    monkeypatch.setattr(module, "CHUNK_PAIRS", 5)
    monkeypatch.setattr(module, "OPEN_CHUNKS", 1)
    sets = sets_of(tmp_path)
    score_all(pairs, panel, sets, cache_bytes)
    assert tiny.hashes(tmp_path) == tiny.hashes(scored.folder)


def test_shards_share_batches_and_images(
    pairs: PairSource, panel: Panel, sets_of: Callable[..., ScoreSets], tmp_path: Path
) -> None:
    sizes, queues = [], []

    class Counted(Batcher):
        def _run(self) -> None:
            sizes.append(min(len(self.waiting), self.batch.size))
            super()._run()

    def counted(*given: Any) -> Batcher:
        queues.append(Counted(*given))
        return queues[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("label.scoring.scoring_pass.Batcher", counted)
        score_all(pairs, panel.only(["aesthetic"]), sets_of(tmp_path, "aesthetic"))
    distinct = {
        bytes(row[f"image_{side}"] or b"")
        for shard in pairs.shards
        for table in pairs.read(shard)
        for row in table.to_pylist()
        for side in (0, 1)
    }
    readable = sum(process_image(content, []).status is Status.OK for content in distinct)
    assert sum(sizes) == readable  # those of row 0 come again in the middle of the second shard
    drained = 1  # at the end of the first shard; from then on the network is known to be even
    assert sum(size < 8 for size in sizes) <= drained + 1


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_networks_still_give_every_rank_the_same(
    world: int,
    pairs: PairSource,
    panel: Panel,
    scored: ScoreSets,
    sets_of: Callable[..., ScoreSets],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def uneven(self: Any, images: np.ndarray) -> Tensor:
        places = torch.arange(len(images))[:, None]
        return embed(self, images) + places * 1e-4

    embed = HfClipBackbone.embed_images
    monkeypatch.setattr(HfClipBackbone, "embed_images", uneven)
    results = []
    for name, size in (("one", 1), ("more", world)):
        sets = sets_of(tmp_path / name, "clip")
        for rank in range(size):
            with DecodePool(0) as decoder:
                tools = ScoringTools(pairs, panel, sets, decoder, Batch(8), Clock())
                score_shards(plan(sets, Rank(rank, size)), tools)
        results.append(tiny.hashes(sets.folder))
    assert results[0] == results[1]
    expected = tiny.hashes(scored.folder)
    assert results[0]["clip/part-00000.parquet"] != expected["clip/part-00000.parquet"]


def test_a_score_that_is_not_finite_is_a_status(
    pairs: PairSource,
    panel: Panel,
    sets_of: Callable[..., ScoreSets],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflow(
        self: CosineMetric, images: Float[Tensor, "row dim"], texts: Float[Tensor, "row dim"]
    ) -> Float[Tensor, " row"]:
        return torch.where(torch.arange(len(images)) == 1, torch.inf, 1.0)

    monkeypatch.setattr(CosineMetric, "score", overflow)
    sets = sets_of(tmp_path, "clip")
    score_all(pairs, panel, sets)
    first = pq.read_table(sets.path("clip", pairs.shards[0])).to_pylist()[0]
    assert (first["score_0"], first["score_1"]) == (1.0, None)
    assert (first["status_0"], first["status_1"]) == ("ok", "not_finite_score")


def test_manifests_describe_complete_sets(scored: ScoreSets, pairs: PairSource) -> None:
    scored.declare_complete({"batch": 8}, since=time.time())
    for name in scored.names:
        manifest = read_manifest(scored.folder / name, name)
        assert manifest is not None
        verify(scored.folder / name, manifest)
        assert manifest.rows == sum(shard.rows for shard in pairs.shards)
        assert manifest.sources == [
            {"name": s.name, "bytes": s.bytes, "sha256": sha256_of(Path(pairs.root) / s.file)}
            for s in pairs.shards
        ]
    clip = read_manifest(scored.folder / "clip", "clip")
    assert clip is not None
    assert clip.settings["preprocessing"]["side"] == tiny.SIDE
    assert set(clip.settings["weights"]) >= {"model.safetensors", "config.json"}


def test_other_settings_are_refused(
    scored: ScoreSets, pairs: PairSource, sets_of: Callable[..., ScoreSets]
) -> None:
    changed = sets_of(scored.folder, "clip")
    changed.metrics["clip"]["dtype"] = "bf16"
    with pytest.raises(ShardError, match=r"clip/part-00000\.parquet.*dtype: found fp32, now bf16"):
        plan(changed, Rank())
    moved = [replace(pairs.shards[1], index=0)]
    with pytest.raises(ShardError, match=r"source\.name: found train-00000.*now train-00001"):
        plan(ScoreSets(scored.folder, tuple(moved), scored.metrics), Rank())


def test_torn_score_shard_is_named_with_what_to_do(
    pairs: PairSource, panel: Panel, sets_of: Callable[..., ScoreSets], tmp_path: Path
) -> None:
    sets = sets_of(tmp_path, "clip")
    score_all(pairs, panel, sets)
    path = sets.path("clip", pairs.shards[2])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ShardError, match=r"part-00002.*delete it and run the same command again"):
        plan(sets, Rank())


def test_a_changed_score_shard_is_noticed_and_never_declared_right(
    pairs: PairSource, panel: Panel, sets_of: Callable[..., ScoreSets], tmp_path: Path
) -> None:
    """A valid file with the right footer, in which somebody has swapped the two images' scores."""
    sets = sets_of(tmp_path, "clip")
    score_all(pairs, panel, sets)
    sets.declare_complete({}, since=time.time())
    path, manifest = sets.path("clip", pairs.shards[1]), tmp_path / "clip" / "manifest.json"
    sound, declared = path.read_bytes(), manifest.read_bytes()
    table = pq.read_table(path)
    swapped = [table["pair_id"], *(table[f"{kind}_{side}"] for kind in ("score", "status")
               for side in (1, 0))]  # fmt: skip
    pq.write_table(pa.table(swapped, schema=table.schema), path)
    assert plan(sets, Rank()) == []  # it looks finished
    with pytest.raises(ShardError, match=r"part-00001.parquet has other bytes .* changed after"):
        sets.declare_complete({}, since=time.time() + 1)
    assert manifest.read_bytes() == declared
    path.unlink()  # as the message says
    since = time.time()
    score_all(pairs, panel, sets)
    assert path.read_bytes() == sound
    pq.write_table(pq.read_table(path), path, compression="none")  # as if rounded otherwise
    sets.declare_complete({}, since=since)
    result = read_manifest(tmp_path / "clip", "clip")
    assert result is not None
    verify(tmp_path / "clip", result)


# --- ranks share the shards ----------------------------------------------------------------------


@pytest.fixture
def ten(tmp_path: Path) -> ScoreSets:
    shards = [PairShard(i, f"{i}.parquet", f"{i}.parquet", 10 + i, 1) for i in range(10)]
    return ScoreSets(tmp_path, tuple(shards), {})


def finish(sets: ScoreSets, *indices: int) -> None:
    """Write a set's files as another rank would."""
    for index in indices:
        settings = sets.settings(FACTS, sets.shards[index])
        write_table(sets.path(FACTS, sets.shards[index]), pa.table({"x": [1]}), settings)


def test_blocks_are_of_neighbours_and_every_rank_comes_to_every_shard(ten: ScoreSets) -> None:
    assert [task.shard.index for task in plan(ten, Rank(1, 3))] == [3, 4, 5]
    for world in (1, 2, 3, 7, 12):
        blocks = [[task.shard.index for task in plan(ten, Rank(r, world))] for r in range(world)]
        assert sum(blocks, []) == list(range(10))  # neighbours stay together
        for rank, block in enumerate(blocks):
            order = work_order(len(ten.shards), Rank(rank, world))
            assert order[: len(block)] == block
            assert sorted(order) == list(range(10))


def test_those_who_help_with_a_block_begin_at_different_places(ten: ScoreSets) -> None:
    orders = [work_order(len(ten.shards), Rank(rank, 3)) for rank in range(3)]
    last = range(6, 10)  # the block of the third rank: forwards itself, backwards the others
    assert [[i for i in order if i in last] for order in orders] == [
        [7, 6, 9, 8], [9, 8, 7, 6], [6, 7, 8, 9],
    ]  # fmt: skip


def test_what_was_finished_meanwhile_is_not_done_again(ten: ScoreSets) -> None:
    finish(ten, 9)
    tasks = remaining(ten, Rank(0, 2))
    assert next(tasks).shard.index == 0
    finish(ten, 1, 5)
    assert [task.shard.index for task in tasks] == [2, 3, 4, 8, 7, 6]


def test_a_file_that_is_there_is_never_replaced(
    pairs: PairSource, panel: Panel, sets_of: Callable[..., ScoreSets], tmp_path: Path
) -> None:
    """Two ranks that do the same shard: the second one's files are dropped."""
    sets = sets_of(tmp_path, "clip")
    work = plan(sets, Rank())
    with DecodePool(0) as decoder:
        tools = ScoringTools(pairs, panel, sets, decoder, Batch(8), Clock())
        score_shards(work, tools)
        before = {path: path.stat().st_ino for path in tmp_path.rglob("*.parquet")}
        assert score_shards(work, tools) == sum(shard.rows for shard in pairs.shards)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")
            if path.is_file()} == before  # fmt: skip


@pytest.mark.parametrize("has_links", [True, False])
def test_the_first_of_two_writers_wins(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [errno.EPERM]

    def refused(*_: object) -> None:
        raise OSError(errors[-1], "no link")

    if not has_links:
        monkeypatch.setattr("os.link", refused)
    path = tmp_path / "x"
    for content in ("first", "second"):
        with atomic_path(path, keep_existing=True) as partial:
            partial.write_text(content)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    errors.append(errno.ENOSPC)
    monkeypatch.setattr("os.link", refused)
    with (
        pytest.raises(ShardError, match="free some space"),
        atomic_path(path, keep_existing=True) as partial,
    ):
        partial.write_text("third")
    assert list(tmp_path.iterdir()) == [path]


def test_progress_counts_files_of_all_and_what_this_process_has_read(ten: ScoreSets) -> None:
    count = PairCount(ten)
    assert (count.total, count.done()) == (sum(range(10, 20)), 0)
    finish(ten, 0, 4)
    count.advance(ten.shards[4], 14)  # finished, too
    count.advance(ten.shards[5], 4)
    count.advance(ten.shards[5], 3)
    count.advance(ten.shards[6], 12)
    count.advance(ten.shards[6], 12)  # never more than it has
    assert count.done() == 10 + 14 + 7 + 16


def test_a_set_cannot_be_called_like_the_facts(scored: ScoreSets) -> None:
    for name in ("pairs", "latents"):
        with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
            ScoreSets(scored.folder, scored.shards, {name: {}})


def test_rank_comes_from_the_launcher() -> None:
    assert Rank.from_environment({}) == Rank(0, 1, 0)
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Rank.from_environment(given) == Rank(5, 8, 1, 8)
    with pytest.raises(ValueError, match="the environment has RANK='first', needed is a number"):
        Rank.from_environment({"RANK": "first"})
    assert Rank.from_environment({"LOCAL_WORLD_SIZE": "0"}).local_world_size == 1
    with pytest.raises(ValueError, match="RANK=2 is not below WORLD_SIZE=2"):
        Rank.from_environment({"RANK": "2", "WORLD_SIZE": "2"})
