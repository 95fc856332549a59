"""Both stages on pairs that are no Parquet: JSON lists beside a tar of images."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.job import settings
from data.artifacts.atomic import ShardError
from data.artifacts.manifest import read_manifest
from data.artifacts.parquet_io import read_settings, read_table
from data.artifacts.schemas import Status
from data.distributed import Rank
from data.images import Size, UnreadableImageError, decode, fit_square
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import BLOBS, PairSource
from label.analysis.gallery import read_images
from label.config import Rule, VoteSpec
from label.metrics.registry import resolve
from label.scoring.batching import Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.panel import Panel
from label.scoring.score_sets import FACTS, ScoreSets, plan
from label.scoring.scoring_pass import Clock
from label.scoring.shard_scorer import ScoringTools, score_shards
from label.voting.label_set import LabelSet, label_settings, make_labels
from label.voting.rules import VotingRule
from tests import helpers_label as tiny
from tests.helpers_pairs import KINDS, make_set
from tests.helpers_stores import Shop, served_folder
from train.loader.dataset import decided_pairs
from train.loader.loader import PairStream, StreamPlan
from train.loader.order import Position

served = pytest.fixture(served_folder)

SIDE, ROWS, IMAGES = 16, 300, 6
SPECS = {"hpdv2": {}, "hpdv3": {"side_seed": 5}}


def write_set(root: Path, kind: str) -> PairsSpec:
    """300 pairs over six images; row 3's right image is lost, and row 5 is torn."""
    entries = []
    for i in range(ROWS):
        left, right = f"{i % IMAGES}.jpg", f"{(i + 1) % IMAGES}.jpg"
        right = "lost.jpg" if i == 3 else "torn.jpg" if i == 5 else right
        pair = {"prompt": f"a cat {i % 4}"}
        if kind == "hpdv2":
            pair |= {"file_path": [left, right], "human_preference": [i % 2, 1 - i % 2]}
        else:
            pair |= {"path1": left, "path2": right, "model1": "x", "model2": "y"}
        entries.append(pair)
    (root / "train.json").write_text(json.dumps(entries))
    images = {f"{i}.jpg": tiny.image(i) for i in range(IMAGES)} | {"torn.jpg": b"\xff\xd8"}
    with tarfile.open(root / "train.tar", "w") as archive:
        for name, content in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return PairsSpec(kind=kind, root=str(root), **SPECS[kind])


def score(spec: PairsSpec, weights: Path, folder: Path) -> tuple[PairSource, ScoreSets]:
    """The scores of one tiny scorer."""
    source, specs = open_pairs(spec), {"clip": tiny.specs(weights)["clip"]}
    metrics = {name: resolve(name, one).settings() for name, one in specs.items()}
    sets = ScoreSets(folder / "scores", source.shards, metrics)
    panel = Panel.load(specs, torch.device("cpu"))
    with DecodePool(0) as decoder:
        tools = ScoringTools(source, panel, sets, decoder, Batch(8), Clock())
        score_shards(plan(sets, Rank()), tools)
    sets.declare_complete({}, 0.0)
    return source, sets


def label(spec: PairsSpec, weights: Path, folder: Path) -> tuple[PairSource, ScoreSets, Path]:
    """Stage one with one tiny scorer that decides alone."""
    source, sets = score(spec, weights, folder)
    vote = VoteSpec(rule=Rule.single, metric="clip")
    voting_rule = VotingRule(vote, ("clip",))
    decides = label_settings(voting_rule, settings(vote), sets.metrics, source.shards)
    make_labels(LabelSet(folder / "labels", decides), sets, voting_rule, {}, 0.0)
    return source, sets, folder / "labels"


def test_every_row_of_every_layout_ends_in_a_status(tmp_path: Path):
    weights = tiny.build_weights(tmp_path / "weights")
    for kind in KINDS:
        (tmp_path / kind / "set").mkdir(parents=True)
        spec = make_set(kind, tmp_path / kind / "set")
        source, sets = score(spec, weights, tmp_path / kind)
        pairs = [
            row for shard in source.shards for t in source.read(shard) for row in t.to_pylist()
        ]
        facts, scores = (
            [r for shard in source.shards for r in read_table(sets.path(name, shard)).to_pylist()]
            for name in (FACTS, "clip")
        )
        assert [(fact["source"], fact["row"]) for fact in facts] == [
            (shard.name, row) for shard in source.shards for row in range(shard.rows)
        ]
        assert [fact["pair_id"] for fact in facts] == [one["pair_id"] for one in scores]
        whole = [bool(p["prompt"]) and all(is_image(p[name]) for name in BLOBS) for p in pairs]
        assert [fact["status"] == "ok" for fact in facts] == whole
        assert [fact["reason"] == "" for fact in facts] == whole
        for fact, one in zip(facts, scores, strict=True):
            assert {fact["status"], one["status_0"], one["status_1"]} <= set(Status)
            for side in (0, 1):
                assert (one[f"score_{side}"] is not None) == (one[f"status_{side}"] == "ok")
        counts = Counter(fact["status"] for fact in facts)
        manifest = read_manifest(sets.folder / "clip", "clip")
        assert manifest is not None
        assert sum(counts.values()) == manifest.rows == manifest.counts["pairs"] == len(pairs)


def is_image(content: bytes | None) -> bool:
    try:
        return bool(decode(content or b"").size)
    except UnreadableImageError:
        return False


@pytest.mark.parametrize("kind", list(SPECS))
def test_labels_and_training_need_no_parquet(tmp_path: Path, kind: str):
    spec = write_set(tmp_path, kind)
    source, sets, folder = label(spec, tiny.build_weights(tmp_path / "weights"), tmp_path)
    facts = read_table(sets.path(FACTS, source.shards[0])).to_pylist()
    assert Counter(fact["status"] for fact in facts) == {"ok": ROWS - 2, "unreadable_image": 2}
    assert [fact["row"] for fact in facts if fact["status"] != "ok"] == [3, 5]
    assert facts[3]["reason"].split(": ")[1] == "no bytes"
    labels = {row["pair_id"]: row for row in read_table(folder / "part-00000.parquet").to_pylist()}
    assert len(labels) == ROWS
    decided = decided_pairs(folder, source)
    assert [group.index for group in decided.groups] == [0, 1]
    assert len(decided) == sum(row["winner"] is not None for row in labels.values()) > 200
    stream = PairStream(decided, source, StreamPlan(
        seed=1, batch=32, micro_batch=8, window=1, sizes=(Size(SIDE, SIDE),)))  # fmt: skip
    pixels = {f"{i}.jpg": fit_square(decode(tiny.image(i)), SIDE) for i in range(IMAGES)}
    seen = set()
    for batch in islice(stream.batches(Position()), 4 * stream.epoch_batches):
        for pair, winner, loser in zip(batch.pair_ids, batch.winner, batch.loser, strict=True):
            row = labels[pair]
            assert np.array_equal(winner.numpy(), pixels[row[f"image_{row['winner']}"]])
            assert np.array_equal(loser.numpy(), pixels[row[f"image_{1 - row['winner']}"]])
            seen.add(row["row"])
    assert len(seen) == 32 * stream.epoch_batches
    assert max(seen) >= 256  # the second row group was read
    shown = read_images(source, [("train.json#00000", 3), ("train.json#00000", 299)])
    assert sorted(bool(uri) for uri in shown["train.json#00000", 3]) == [False, True]


def test_labels_and_training_from_an_object_store(
    tmp_path: Path, served: Shop, monkeypatch: pytest.MonkeyPatch
):
    """The same bytes as from a folder, and the same batches."""
    spec = write_set(served.folder / "set", "hpdv2")
    weights = tiny.build_weights(tmp_path / "weights")
    local, _, folder = label(spec, weights, tmp_path / "local")
    remote, sets, remote_folder = label(
        replace(spec, root=served.hub("set"), image_root=served.s3("set")),
        weights,
        tmp_path / "remote",
    )
    assert tiny.hashes(tmp_path / "remote") == tiny.hashes(tmp_path / "local")
    assert len(tiny.hashes(tmp_path / "remote")) == 3
    assert read_settings(sets.path(FACTS, remote.shards[0]))["source"]["sha256"]
    plan_ = StreamPlan(seed=1, batch=32, micro_batch=8, window=1, sizes=(Size(SIDE, SIDE),))
    batches = [
        next(PairStream(decided_pairs(labels, source), source, plan_).batches(Position()))
        for labels, source in ((folder, local), (remote_folder, remote))
    ]
    assert batches[0].pair_ids == batches[1].pair_ids
    assert torch.equal(batches[0].winner, batches[1].winner)


def test_scores_of_other_sides_are_not_taken_for_these(tmp_path: Path):
    spec = write_set(tmp_path, "hpdv3")
    _, sets, folder = label(spec, tiny.build_weights(tmp_path / "weights"), tmp_path)
    spec.side_seed = 6
    other = open_pairs(spec)
    with pytest.raises(ShardError, match=r"source.reading: found sides by seed 5, now .* seed 6"):
        plan(ScoreSets(sets.folder, other.shards, sets.metrics), Rank())
    decided = decided_pairs(folder, other)
    stream = PairStream(decided, other, StreamPlan(
        seed=1, batch=32, micro_batch=8, window=1, sizes=(Size(SIDE, SIDE),)))  # fmt: skip
    with pytest.raises(ShardError, match="was labelled with the images"):
        next(stream.batches(Position()))


def test_an_image_that_is_gone_since_labelling_names_its_pair(tmp_path: Path):
    spec = write_set(tmp_path, "hpdv2")
    _, _, folder = label(spec, tiny.build_weights(tmp_path / "weights"), tmp_path)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        info = tarfile.TarInfo("0.jpg")
        info.size = len(tiny.image(0))
        archive.addfile(info, io.BytesIO(tiny.image(0)))
    source = open_pairs(spec)
    stream = PairStream(decided_pairs(folder, source), source, StreamPlan(
        seed=1, batch=32, micro_batch=8, window=1, sizes=(Size(SIDE, SIDE),)))  # fmt: skip
    with pytest.raises(ShardError, match=r"image \d of pair .* of train\.json#00000\) cannot be"):
        next(stream.batches(Position()))
