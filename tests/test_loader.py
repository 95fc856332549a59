"""The stream over pair files: the right images, resumable anywhere, refuses damage."""

import io
import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from data.artifacts.atomic import ShardError
from data.artifacts.manifest import describe
from data.artifacts.parquet_io import read_table, write_table
from data.images import decode, encode_png, fit_square
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from tests.helpers_train import SIDE, SQUARE, image, write_labels, write_pairs
from train.loader.dataset import decided_pairs
from train.loader.loader import PairBatch, PairStream, StreamPlan
from train.loader.order import Position

# --- the stream ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    write_pairs(root / "pairs")
    write_labels(root / "labels", root / "pairs")
    return root


def stream(root: Path, **kwargs: int) -> PairStream:
    plan = {"seed": 1, "batch": 8, "micro_batch": 2, "window": 2, "sizes": (SQUARE,)} | kwargs
    source = open_pairs(PairsSpec(root=str(root / "pairs")))
    return PairStream(decided_pairs(root / "labels", source), source, StreamPlan(**plan))


def take(pairs: PairStream, micro_batches: int, at: Position | None = None) -> list[PairBatch]:
    return list(islice(pairs.batches(at or Position()), micro_batches))


def ids(batches: list[PairBatch]) -> list[str]:
    return [pair for batch in batches for pair in batch.pair_ids]


def test_pairs_come_with_the_right_images(root: Path):
    """Pair i has the images 2i and 2i + 1; the label says that odd pairs are won by image 1."""
    pairs = stream(root)
    labels = [
        row
        for part in ("part-00000.parquet", "part-00001.parquet")
        for row in read_table(root / "labels" / part).to_pylist()
    ]
    number = {row["pair_id"]: i for i, row in enumerate(labels)}
    seen = 0
    for batch in take(pairs, 12):
        for pair, prompt, winner, loser in zip(
            batch.pair_ids, batch.prompts, batch.winner, batch.loser, strict=True
        ):
            i = number[pair]
            expected = [
                fit_square(decode(image(2 * i + side)), SIDE) for side in (i % 2, 1 - i % 2)
            ]
            assert np.array_equal(winner.numpy(), expected[0])
            assert np.array_equal(loser.numpy(), expected[1])
            assert prompt == labels[i]["prompt"]
            assert i % 7 != 6  # undecided
            seen += 1
    assert seen == 24


def test_votes_become_the_winners_fraction(root: Path):
    """3 of 4, 4 of 4, none cast and 1 of 4, for winners on either side."""
    whole = stream(root)
    table = whole.pairs.table.slice(0, 4)
    winners, votes = table["winner"].to_pylist(), [(3, 1), (4, 0), (None, None), (1, 3)]
    assert set(winners) == {0, 1}
    for side in (0, 1):
        of_side = [pair[side != winner] for pair, winner in zip(votes, winners, strict=True)]
        column = table.column_names.index(f"votes_{side}")
        table = table.set_column(column, f"votes_{side}", pa.array(of_side, pa.int8()))
    pairs = replace(whole.pairs.only(np.arange(4)), table=table)
    plan = replace(whole.plan, batch=4)
    batch = PairStream(pairs, whole.source, plan).pick(np.arange(4))
    assert batch.vote_fraction.tolist() == [0.75, 1.0, 1.0, 0.25]


def test_an_epoch_is_cut_to_whole_batches_and_then_the_next_order_begins(root: Path):
    pairs = stream(root)
    assert len(pairs.pairs) == 31
    assert pairs.epoch_batches == 3
    batches = take(pairs, 24)
    first, second = ids(batches[:12]), ids(batches[12:])
    assert len(set(first)) == len(set(second)) == 24
    assert first != second
    assert [batch.epochs for batch in batches] == [(0, 0)] * 12 + [(1, 1)] * 12
    assert pairs.after(Position(0, 2)) == Position(1, 0)
    assert pairs.after(Position(1, 0)) == Position(1, 1)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(root: Path, world: int):
    alone = ids(take(stream(root), 16))
    per_rank = [
        ids(take(stream(root, rank=rank, world_size=world), 16 // world)) for rank in range(world)
    ]
    mine = 8 // world
    for batch in range(4):
        parts = [rank_ids[batch * mine : (batch + 1) * mine] for rank_ids in per_rank]
        together = [pair for part in parts for pair in part]
        assert sorted(together) == sorted(alone[batch * 8 : (batch + 1) * 8])


@pytest.mark.parametrize("done", range(8))
def test_resuming_repeats_nothing_and_leaves_out_nothing(root: Path, done: int):
    pairs, at = stream(root), Position()
    for _ in range(done):
        at = pairs.after(at)
    straight = take(stream(root), 40)
    resumed = take(pairs, 40 - 4 * done, at)
    assert ids(resumed) == ids(straight[4 * done :])
    assert all(
        torch.equal(one.winner, two.winner)
        for one, two in zip(resumed, straight[4 * done :], strict=True)
    )


@pytest.mark.parametrize(
    "change", [{"micro_batch": 4}, {"workers": 3}, {"micro_batch": 8, "workers": 0}]
)
def test_what_is_no_part_of_the_order_does_not_change_it(root: Path, change: dict[str, int]):
    pairs = 24 // change.get("micro_batch", 2)
    assert ids(take(stream(root, **change), pairs)) == ids(take(stream(root), 12))


def test_seed_and_window_are_part_of_the_order(root: Path):
    base = ids(take(stream(root), 12))
    assert ids(take(stream(root, seed=2), 12)) != base
    assert ids(take(stream(root, window=1), 12)) != base


def test_no_more_than_two_windows_are_in_memory(root: Path):
    pairs = stream(root, window=1, micro_batch=1)
    widest = 0
    for _ in islice(pairs.batches(Position()), 48):
        widest = max(widest, len(pairs._open))
    assert len(pairs.pairs.groups) == 7
    assert 1 <= widest <= 2


# --- what can be wrong ---------------------------------------------------------------------------


def test_missing_labels_say_what_to_run(root: Path, tmp_path: Path):
    source = open_pairs(PairsSpec(root=str(root / "pairs")))
    with pytest.raises(ShardError, match="make labels"):
        decided_pairs(tmp_path, source)


def test_no_decided_pair_is_a_clear_error(root: Path, tmp_path: Path):
    (tmp_path / "pairs").symlink_to(root / "pairs")
    write_labels(tmp_path / "labels", root / "pairs", undecided=1)
    with pytest.raises(ShardError, match="no pair of the label set has a winner"):
        stream(tmp_path)


def test_fewer_pairs_than_a_batch_is_a_clear_error(root: Path):
    with pytest.raises(ShardError, match=r"31 decided pairs.*train.batch=32 to at most 31"):
        stream(root, batch=32)


def test_a_batch_must_divide_among_the_ranks(root: Path):
    with pytest.raises(ValueError, match="8 is no multiple of train.micro_batch=2 x 3 processes"):
        stream(root, world_size=3)


def test_a_window_beyond_the_memory_bound_is_refused(root: Path):
    with pytest.raises(ValueError, match=r"train.window=2 .* more than train.memory_mb=0"):
        stream(root, memory_mb=0)


def test_a_damaged_label_file_is_named(root: Path, tmp_path: Path):
    (tmp_path / "pairs").symlink_to(root / "pairs")
    write_labels(tmp_path / "labels", root / "pairs")
    path = tmp_path / "labels" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ShardError, match=r"part-00001.parquet has other bytes"):
        stream(tmp_path)


def test_other_pair_files_than_were_labelled_are_noticed(root: Path, tmp_path: Path):
    write_labels(tmp_path / "labels", root / "pairs")
    write_pairs(tmp_path / "pairs", sizes=(16, 20))  # the same names, other rows
    with pytest.raises(ShardError, match="its row 19; give the pairs that were labelled"):
        stream(tmp_path)
    write_pairs(tmp_path / "pairs", sizes=(21, 16))
    with pytest.raises(ShardError, match="was labelled with the images"):
        take(stream(tmp_path), 24)
    (tmp_path / "pairs" / "train-1.parquet").unlink()
    with pytest.raises(ShardError, match="made from train-1.parquet, which is not under"):
        stream(tmp_path)


def test_an_image_that_broke_since_labelling_names_its_pair(tmp_path: Path):
    root = write_pairs(tmp_path / "pairs", sizes=(16,))
    write_labels(tmp_path / "labels", root)
    path = root / "train-0.parquet"
    table = read_table(path)
    broken = [value[: len(value) // 2] for value in table["jpg_1"].to_pylist()]
    column = table.column_names.index("jpg_1")
    write_table(path, table.set_column(column, "jpg_1", pa.array(broken)), row_group_rows=6)
    with pytest.raises(ShardError, match=r"image 1 of pair \w+-0 .* cannot be read any more"):
        take(stream(tmp_path), 4)


def test_the_order_knows_the_label_rows_and_nothing_else(root: Path, tmp_path: Path):
    """Another revision of the code or another machine labels the same: the same order."""
    (tmp_path / "pairs").symlink_to(root / "pairs")
    write_labels(tmp_path / "labels", root / "pairs")
    path = tmp_path / "labels" / "manifest.json"
    value = json.loads(path.read_text())
    noted = {"provenance": {"machine": "another"}, "code_revision": "another"}
    path.write_text(json.dumps(value | noted))
    assert ids(take(stream(tmp_path), 12)) == ids(take(stream(root), 12))
    shard = tmp_path / "labels" / "part-00000.parquet"
    table = read_table(shard)
    other = pa.array([1] * table.num_rows, pa.int8())
    column = table.column_names.index("votes_0")
    write_table(shard, table.set_column(column, "votes_0", other))
    file = asdict(describe(shard))
    path.write_text(json.dumps(value | {"files": [file, *value["files"][1:]]}))
    assert ids(take(stream(tmp_path), 12)) != ids(take(stream(root), 12))


# --- the square ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (16, 16), (7, 9)])
def test_images_become_squares_around_their_middle(width: int, height: int):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 255
    square = fit_square(Image.open(io.BytesIO(encode_png(pixels))).convert("RGB"), 16)
    assert square.shape == (16, 16, 3)
    assert square.dtype == np.uint8
    assert square[8, 1, 0] > 200  # left bright, right dark, whatever was cut
    assert square[8, 14, 0] < 60


def test_an_image_of_the_right_size_is_untouched():
    decoded = decode(image(3))
    assert np.array_equal(fit_square(decoded, SIDE), np.asarray(decoded))
