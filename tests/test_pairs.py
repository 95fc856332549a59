"""The Pick-a-Pic reader: any folder of such files, bounded memory, clear refusals."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.kinds import valid_text
from data.pairs.schema import PAIR, PairsError, image_key, pair_key
from data.storage.base import StoreError
from tests.helpers_pairs import pickapic
from tests.test_conf import job


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


REAL = pa.schema(
    [
        ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")), ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()), ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()), ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()), ("jpg_1", pa.binary()),
        ("label_0", pa.float64()), ("label_1", pa.float64()),
        ("model_0", pa.string()), ("model_1", pa.string()),
        ("ranking_id", pa.int64()), ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()), ("__index_level_0__", pa.int64()),
    ],
    metadata={"huggingface": '{"info": {"features": {}}}'},
)  # fmt: skip
"""The columns of Pick-a-Pic v1 and v2 as they are published."""


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_published_files_are_read_by_the_shipped_settings(tmp_path: Path, version: str):
    rows = pickapic(rows=3, label_0=[1.0, 0.5, 0.0], has_label=[True, True, False]).to_pylist()
    whole = [dict.fromkeys(REAL.names) | row for row in rows]
    names = {
        "v1": ("train-00000-of-00387-0123456789abcdef", "validation_unique-00000-of-00001-89ab"),
        "v2": ("train-00000-of-00645-b66ac786bf6fb553", "validation_unique-00000-of-00001-33ead1"),
    }[version]
    (tmp_path / "data").mkdir()
    for name in names:
        pq.write_table(pa.Table.from_pylist(whole, REAL), tmp_path / "data" / f"{name}.parquet")
    spec = job("pairs=pickapic", f"pairs.root={tmp_path}/data").pairs
    (shard,) = open_pairs(spec).shards
    assert shard.name == f"{names[0]}.parquet"
    assert pa.concat_tables(open_pairs(spec).read(shard))["human"].to_pylist() == [1.0, 0.5, None]
    spec = job("pairs=pickapic", f"pairs.root={tmp_path}", "pairs.split=validation_unique").pairs
    assert [shard.name for shard in open_pairs(spec).shards] == [f"data/{names[1]}.parquet"]


def not_utf8(*texts: bytes) -> pa.Array:
    return pa.array(texts, pa.binary()).view(pa.string())


def test_text_that_is_no_utf8_keeps_its_row(tmp_path: Path):
    table = pickapic(rows=2, caption=not_utf8(b"a caf\xe9", "café".encode()),
                     image_0_uid=not_utf8(b"\xff", b"u"))  # fmt: skip
    pq.write_table(table, tmp_path / "train.parquet")
    source = open_pairs(PairsSpec(root=str(tmp_path)))
    for read in (
        next(iter(source.read(source.shards[0]))),
        source.read_row_group(source.shards[0], 0),
    ):
        assert read["prompt"].to_pylist() == ["a caf\ufffd", "café"]
        assert read["uid_0"].to_pylist() == ["\ufffd", "u"]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5), st.booleans())
def test_any_bytes_of_text_become_text(texts: list[bytes], large: bool):
    column = pa.chunked_array([pa.array(texts, pa.binary()).view(pa.string())])
    checked = valid_text(column.cast(pa.large_string()) if large else column)
    assert checked.to_pylist() == [text.decode("utf-8", "replace") for text in texts]


def test_a_damaged_page_names_its_rows(tmp_path: Path):
    path = tmp_path / "train.parquet"
    images = [bytes([i]) * 500 for i in range(10)]
    pq.write_table(pickapic(jpg_0=images), path, row_group_size=5, write_page_checksum=True,
                   use_dictionary=False, write_statistics=False)  # fmt: skip
    column = pq.read_metadata(path).row_group(1).column(3)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    path.write_bytes(content)
    source = open_pairs(PairsSpec(root=str(tmp_path)))
    shard = source.shards[0]
    assert source.read_row_group(shard, 0).num_rows == 5
    with pytest.raises(PairsError, match=r"train\.parquet row group 1 cannot be read: .*CRC"):
        source.read_row_group(shard, 1)
    batches = source.read(shard, batch_rows=5)
    assert next(batches).num_rows == 5
    with pytest.raises(PairsError, match=r"parquet row 5, or one soon after it, .* fetch it again"):
        next(batches)


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


# --- kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pickapick", r"pairs\.kind=pickapick is no layout; did you mean pickapic\?.*my_package"),
        (
            "schema",
            r"is no layout; .*allowed are folders, hpdv2, hpdv3, imagefolder, imagereward, jsonl, ",
        ),
        ("nowhere.layout", r"nowhere\.layout cannot be imported \(No module named 'nowhere'\)"),
        (".pickapic", r"\.pickapic cannot be imported"),
        ("", r"pairs\.kind= is no layout"),
        ("json.decoder", r"json\.decoder has no function open_layout"),
        ("broken_package.layout", r"cannot be imported \(No module named 'its_dependency'\)"),
        ("broken_package.opener", r"open_layout gave dict, which lacks methods"),
    ],
)
def test_a_kind_that_is_none_is_refused(
    kind: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "layout.py").write_text("import its_dependency")
    (tmp_path / "broken_package" / "opener.py").write_text("def open_layout(spec):\n    return {}")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PairsError, match=says):
        open_pairs(PairsSpec(kind=kind, root="/nowhere"))


def test_an_option_that_nobody_reads_is_refused(tmp_path: Path):
    spec = PairsSpec(kind="miniature", root=str(tmp_path), options={"num_pairs": 1, "pairs": 2})
    with pytest.raises(PairsError, match=r"pairs\.options\.pairs is not read .* reads num_pairs"):
        open_pairs(spec)
    spec = PairsSpec(kind="pickapic", root=str(tmp_path), options={"num_pairs": 1})
    with pytest.raises(PairsError, match=r"num_pairs is not read .* which reads no options"):
        open_pairs(spec)


def test_an_empty_root_is_not_the_working_folder():
    with pytest.raises(PairsError, match=r"pairs\.root is empty; give the folder"):
        open_pairs(PairsSpec(kind="pickapic", root=""))


@pytest.mark.parametrize("options", [{}, {"num_pairs": 0}, {"num_pairs": "many"}])
def test_the_miniature_needs_a_number_of_pairs(options: dict, tmp_path: Path):
    with pytest.raises(PairsError, match=r"pairs\.options\.num_pairs=.* 1 or more"):
        open_pairs(PairsSpec(kind="miniature", root=str(tmp_path), options=options))
    assert not list(tmp_path.iterdir())
