"""The Pick-a-Pic reader: any folder of such files, bounded memory, clear refusals."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.pairs import PAIR, PairsError, PairsSpec, image_key, open_pairs, pair_key
from data.stores import StoreError


def pickapic(rows: int = 10, **columns: list[object]) -> pa.Table:
    made = {
        "caption": [f"a cat {i}" for i in range(rows)],
        "image_0_uid": [f"u{i}" for i in range(rows)],
        "image_1_uid": [f"v{i}" for i in range(rows)],
        "jpg_0": [b"0%d" % i for i in range(rows)],
        "jpg_1": [b"1%d" % i for i in range(rows)],
        "label_0": [1.0] * rows,
        "label_1": [0.0] * rows,
        "has_label": [True] * rows,
    } | columns
    return pa.table({name: value for name, value in made.items() if value is not None})


def test_rows_come_in_order_under_our_names(tmp_path: Path):
    labels = [1.0, 0.0, 0.5, 0.0] + [1.0] * 6
    known = [True, True, True, False] + [True] * 6
    table = pickapic(label_0=labels, has_label=known)
    (tmp_path / "deep").mkdir()
    pq.write_table(table, tmp_path / "train-0.parquet")
    pq.write_table(table, tmp_path / "deep" / "train-1.parquet")
    pq.write_table(table, tmp_path / "test-0.parquet")
    source = open_pairs(PairsSpec(root=str(tmp_path)))
    assert [(shard.index, shard.name, shard.rows) for shard in source.shards] == [
        (0, "deep/train-1.parquet", 10),
        (1, "train-0.parquet", 10),
    ]
    batches = list(source.read(source.shards[1], batch_rows=4))
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    read = pa.concat_tables(batches)
    assert read.schema.names == PAIR.names
    assert read["row"].to_pylist() == list(range(10))
    assert read["human"].to_pylist()[:4] == [1.0, 0.0, 0.5, None]
    assert read["image_1"].to_pylist() == table["jpg_1"].to_pylist()
    labels_only = pa.concat_tables(source.read(source.shards[1], images=False))
    assert "image_0" not in labels_only.schema.names


def test_files_without_has_label_are_read(tmp_path: Path):
    pq.write_table(pickapic(has_label=None), tmp_path / "train.parquet")  # type: ignore[arg-type]
    source = open_pairs(PairsSpec(root=str(tmp_path)))
    (batch,) = source.read(source.shards[0])
    assert batch["human"].to_pylist() == [1.0] * 10


def test_a_row_group_is_read_alone(tmp_path: Path):
    pq.write_table(pickapic(), tmp_path / "train.parquet", row_group_size=4)
    source = open_pairs(PairsSpec(root=str(tmp_path)))
    assert source.read_row_group(source.shards[0], 1)["uid_0"].to_pylist() == [
        "u4",
        "u5",
        "u6",
        "u7",
    ]


def test_whole_files_up_to_max_pairs(tmp_path: Path):
    for i in range(4):
        pq.write_table(pickapic(), tmp_path / f"train-{i}.parquet")
    assert len(open_pairs(PairsSpec(root=str(tmp_path), max_pairs=15)).shards) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a folder"),
        ({}, "no Parquet file at all"),
        ({"test-0.parquet": pickapic()}, r"no train\*\.parquet .*test-0\.parquet"),
        (
            {"train-0.parquet": pickapic(jpg_0=None, label_1=None)},
            "lacks the columns jpg_0, label_1",
        ),
        ({"train-0.parquet": pickapic(rows=0)}, "hold no pairs"),
        ({"train-0.parquet": b"PAR1 but torn"}, "not a readable Parquet file"),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, files: dict[str, pa.Table | bytes] | None, message: str
):
    root = tmp_path / "pairs"
    if files is not None:
        root.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                (root / name).write_bytes(content)
            else:
                pq.write_table(content, root / name)
    with pytest.raises((PairsError, StoreError), match=message):
        open_pairs(PairsSpec(root=str(root)))


def test_a_pair_is_named_by_what_it_is():
    cat, dog = image_key(b"cat"), image_key(b"dog")
    name = pair_key(cat, dog, "a pet")
    assert len(name) == 32
    assert name == pair_key(image_key(b"cat"), image_key(b"dog"), "a pet")
    assert len({name, pair_key(dog, cat, "a pet"), pair_key(cat, dog, "a pet ")}) == 3
