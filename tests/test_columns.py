"""What a column holds is checked and cast in one place, whatever the layout and the library."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.pairs import open_pairs
from data.pairs.config import Images, PairsSpec
from data.pairs.schema import PairsError
from tests.helpers_pairs import PICKAPIC, pickapic, rows_of, spec_of, write_images
from tests.helpers_train import image

FULL = pickapic(rows=3, label_0=[1.0, 0.5, 0.0], has_label=[True, True, False])


def spec_for(kind: str, root: Path) -> PairsSpec:
    """The same columns, read by either Parquet layout with images inside."""
    columns = PICKAPIC if kind == "parquet" else {}
    return PairsSpec(kind=kind, root=str(root), columns=columns)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def cast(table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    return with_column(table, name, table[name].cast(kind))


both = pytest.mark.parametrize("kind", ["pickapic", "parquet"])


@both
@pytest.mark.parametrize(
    ("name", "type_"),
    [
        ("caption", pa.dictionary(pa.int32(), pa.string())),
        ("caption", pa.dictionary(pa.uint8(), pa.large_string())),
        ("caption", pa.string_view()),
        ("caption", pa.large_string()),
        ("image_0_uid", pa.dictionary(pa.int8(), pa.string())),
        ("jpg_0", pa.binary_view()),
        ("jpg_1", pa.large_binary()),
        ("jpg_1", pa.binary(2)),
        ("label_0", pa.float16()),
        ("label_0", pa.decimal128(4, 2)),
        ("has_label", pa.int64()),
        ("has_label", pa.uint8()),
    ],
)
def test_types_of_other_libraries_are_read_alike(
    kind: str, name: str, type_: pa.DataType, tmp_path: Path
):
    pq.write_table(FULL, tmp_path / "train.parquet")
    expected = rows_of(open_pairs(spec_for(kind, tmp_path)))
    assert [row["human"] for row in expected] == [1.0, 0.5, None]
    table = FULL
    if pa.types.is_integer(type_):
        table = cast(table, name, pa.uint8())
    pq.write_table(cast(table, name, type_), tmp_path / "train.parquet")
    assert rows_of(open_pairs(spec_for(kind, tmp_path))) == expected


@both
def test_categories_and_enums_of_polars_are_text(kind: str, tmp_path: Path):
    pq.write_table(FULL, tmp_path / "train.parquet")
    expected = rows_of(open_pairs(spec_for(kind, tmp_path)))
    frame = pl.from_arrow(FULL)
    assert isinstance(frame, pl.DataFrame)
    captions = pl.Enum(frame["caption"].to_list())
    frame = frame.with_columns(
        pl.col("caption").cast(captions), pl.col("image_0_uid").cast(pl.Categorical)
    )
    frame.write_parquet(tmp_path / "train.parquet")
    assert rows_of(open_pairs(spec_for(kind, tmp_path))) == expected


@both
@pytest.mark.parametrize("name", ["caption", "jpg_0", "label_0", "has_label"])
def test_a_file_of_nulls_keeps_its_rows(kind: str, name: str, tmp_path: Path):
    pq.write_table(FULL, tmp_path / "train-0.parquet")
    pq.write_table(with_column(FULL, name, pa.nulls(3)), tmp_path / "train-1.parquet")
    rows = rows_of(open_pairs(spec_for(kind, tmp_path)))
    ours = {"caption": "prompt", "jpg_0": "image_0"}.get(name, "human")
    assert [row[ours] for row in rows[3:]] == [None] * 3
    assert rows[0][ours] is not None


LISTS = pa.array([[1], [2], [3]], pa.list_(pa.uint8()))


@both
@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("jpg_0", LISTS, "column jpg_0 is list<.*uint8>, but image_0 must be encoded bytes; write"),
        ("caption", LISTS, "column caption is list<.*>, but prompt must be text"),
        ("caption", pa.array([1, 2, 3]), "column caption is int64, but prompt must be text"),
        ("caption", pa.array([b"1", b"2", b"3"]), "column caption is binary, but prompt must be"),
        ("label_0", pa.array(["1", "0", "1"]), "column label_0 is string, but human must be a num"),
        ("has_label", pa.array(["1", "0", "1"]), "column has_label is string, but known must be t"),
        ("has_label", pa.array([1.0, 0.0, 1.0]), "column has_label is double, but known must be "),
        ("image_0_uid", pa.array([1.5, 2, 3]), "column image_0_uid is double, but uid_0 must be "),
    ],
)
def test_other_types_are_refused_before_anything_is_read(
    kind: str, name: str, values: pa.Array, says: str, tmp_path: Path
):
    pq.write_table(FULL, tmp_path / "train-0.parquet")
    pq.write_table(with_column(FULL, name, values), tmp_path / "train-1.parquet")
    with pytest.raises(PairsError, match=f"train-1.parquet: {says}"):
        open_pairs(spec_for(kind, tmp_path))


@both
@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("label_0", [1.0, 0.5, 2.0], r"column label_0 has 2\.0 in row 2; a human choice is 1 for"),
        ("has_label", [1, 2, 0], "column has_label has 2 in row 1; it must be true or false"),
    ],
)
def test_values_outside_the_range_are_named(
    kind: str, name: str, values: list[Any], says: str, tmp_path: Path
):
    pq.write_table(with_column(FULL, name, pa.array(values)), tmp_path / "train.parquet")
    with pytest.raises(PairsError, match=says):
        rows_of(open_pairs(spec_for(kind, tmp_path)))


def test_no_number_is_no_choice(tmp_path: Path):
    pq.write_table(pickapic(rows=2, label_0=[float("nan"), 1.0]), tmp_path / "train.parquet")
    rows = rows_of(open_pairs(PairsSpec(root=str(tmp_path))))
    assert [row["human"] for row in rows] == [None, 1.0]


@both
def test_two_columns_of_one_name_are_refused(kind: str, tmp_path: Path):
    pq.write_table(FULL.append_column("caption", FULL["caption"]), tmp_path / "train.parquet")
    with pytest.raises(PairsError, match="has 2 columns caption; rename or remove one"):
        open_pairs(spec_for(kind, tmp_path))


def test_ranks_and_paths_of_other_types_are_refused(tmp_path: Path):
    table = {"image_path": ["a", "b"], "prompt_id": [1, 1], "prompt": ["x"] * 2, "rank": ["1", "2"]}
    pq.write_table(pa.table(table), tmp_path / "metadata-train.parquet")
    with pytest.raises(PairsError, match="column rank is string, but rank must be a number"):
        open_pairs(PairsSpec(kind="imagereward", root=str(tmp_path)))


# --- JSON lines ----------------------------------------------------------------------------------

GOOD = {"text": "a cat", "left": "0.png", "right": "1.png", "chose": 1, "sure": True}


def lines(root: Path, *changes: dict[str, Any]) -> PairsSpec:
    write_images(root, ["0.png", "1.png"])
    (root / "x.jsonl").write_text("\n".join(json.dumps(GOOD | change) for change in changes))
    return spec_of(root, "jsonl", Images.paths, known="sure")


@pytest.mark.parametrize(
    ("known", "human"), [(0, None), (False, None), (None, None), (1, 1.0), (True, 1.0)]
)
def test_zero_and_one_are_booleans(known: Any, human: float | None, tmp_path: Path):
    rows = rows_of(open_pairs(lines(tmp_path, {}, {"sure": known})))
    assert rows[1]["human"] == human


@pytest.mark.parametrize("at", [1, 300])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sure": "false"}, "'sure' has 'false', but it must be true or false, or 1 or 0, or null"),
        ({"sure": 2}, "'sure' has 2, but it must be true"),
        ({"chose": "1"}, "'chose' has '1', but it must be a number"),
        ({"chose": 7}, "'chose' has 7; a human choice is 1 for image 0"),
        ({"text": ["a"]}, r"'text' has \['a'\], but it must be text"),
        ({"left": 7}, "'left' has 7, but it must be text"),
    ],
)
def test_a_line_of_another_type_is_named(
    at: int, change: dict[str, Any], says: str, tmp_path: Path
):
    spec = lines(tmp_path, *([{}] * at), change)
    with pytest.raises(PairsError, match=rf"x\.jsonl, line {at + 1}: {says}"):
        open_pairs(spec)


def test_paths_are_no_base64(tmp_path: Path):
    spec = lines(tmp_path, {})
    spec.images = Images.inline
    with pytest.raises(PairsError, match=r"none of the first images is base64, .* '0\.png'; set"):
        open_pairs(spec)


def test_images_that_are_pointers_are_refused(tmp_path: Path):
    spec = lines(tmp_path, {})
    (tmp_path / "0.png").write_text(f"version https://git-lfs.github.com/spec/v1\nsize {1:0100}\n")
    with pytest.raises(PairsError, match=r"the image .*/0\.png is a Git LFS pointer"):
        open_pairs(spec)


def test_images_in_lists_are_still_bytes(tmp_path: Path):
    structs = [{"bytes": image(1), "path": None}] * 3
    pq.write_table(with_column(FULL, "jpg_0", pa.array(structs)), tmp_path / "train.parquet")
    rows = rows_of(open_pairs(spec_for("parquet", tmp_path)))
    assert rows[0]["image_0"] == image(1)
