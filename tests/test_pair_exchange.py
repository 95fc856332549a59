"""`pairs=imagefolder` and `pairs=webdataset`: sets as other programs hand them on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError
from tests.helpers_pairs import (
    FOLDER_COLUMNS,
    TAR_COLUMNS,
    make_set,
    rows_of,
    write_images,
    write_tar,
)
from tests.helpers_train import image

Pair = tuple[str | None, str | None, str | None, float | None]


def pairs_of(spec: PairsSpec) -> list[Pair]:
    rows = rows_of(open_pairs(spec))
    return [(row["prompt"], row["uid_0"], row["uid_1"], row["human"]) for row in rows]


def image_rows(root: Path, text: str, **columns: str) -> PairsSpec:
    """A metadata.csv with an image a row."""
    write_images(root, ["a/0.png", "a/1.png", "a/2.png", "3.png"])
    (root / "metadata.csv").write_text(text)
    columns = FOLDER_COLUMNS | {"human": ""} | columns
    return PairsSpec(kind="imagefolder", root=str(root), split="", columns=columns)


CSV = """\ufefffile_name,text,place
a/0.png,"a cat, sitting
on a mat",2
a/1.png,"a cat, sitting
on a mat",1
3.png,1984,
a/2.png,1984,
"""


def test_a_row_an_image_gives_all_pairs_of_a_prompt(tmp_path: Path):
    pairs = pairs_of(image_rows(tmp_path, CSV, rank="place"))
    assert [prompt for prompt, *_ in pairs] == ["a cat, sitting\non a mat", "1984"]
    assert [{left, right} for _, left, right, _ in pairs] == [
        {"a/0.png", "a/1.png"}, {"3.png", "a/2.png"},
    ]  # fmt: skip
    winner = pairs[0][1] if pairs[0][3] == 1 else pairs[0][2]
    assert winner == "a/1.png"
    assert pairs[1][3] is None


def test_sides_are_drawn_from_the_seed(tmp_path: Path):
    names = [f"{i}.png" for i in range(8)]
    write_images(tmp_path, names)
    text = "\n".join(["file_name,text", *(f"{name},a cat" for name in names)])
    spec = image_rows(tmp_path, text)
    firsts = [[left for _, left, _, _ in pairs_of(replace(spec, side_seed=s))] for s in (0, 0, 1)]
    assert firsts[0] == firsts[1] != firsts[2]
    assert 5 < sum(a != b for a, b in zip(firsts[0], firsts[2], strict=True)) < 23


def test_paths_are_relative_to_the_metadata(tmp_path: Path):
    for split in ("train", "test"):
        write_images(tmp_path / split, ["0.png", "1.png"])
        row = {"text": split, "image_0_file_name": "0.png", "image_1_file_name": "1.png"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row))
    columns = FOLDER_COLUMNS | {"human": ""}
    spec = PairsSpec(kind="imagefolder", root=str(tmp_path), split="test", columns=columns)
    assert pairs_of(spec) == [("test", "test/0.png", "test/1.png", None)]
    assert len(pairs_of(replace(spec, split="all"))) == 2
    with pytest.raises(PairsError, match="files of the splits test, train; choose one"):
        open_pairs(replace(spec, split=""))
    with pytest.raises(PairsError, match=r"no metadata\.csv or metadata\.jsonl of split 'dev'"):
        open_pairs(replace(spec, split="dev"))


@pytest.mark.parametrize(
    ("text", "columns", "says"),
    [
        ("file,text\nx,a", {}, "neither image_0_file_name and .* nor file_name .*has file, text"),
        ("file_name,tex\na/0.png,a", {}, "lacks the columns text; did you mean tex"),
        ("file_name,text\na/0.png,a\na/1.png,b", {}, "the prompt 'a' has one image, a/0.png"),
        ("file_name,text,r\na/0.png,a,x\na/1.png,a,y", {"rank": "r"},
         r"line 2: 'r' has 'x', but it must be a number"),
        ("file_name,text\na/0.png,a,b", {}, "is no table of comma-separated values"),
        ("file_name,text\nb/0.png,a\nb/1.png,a", {}, "none of the first images is under"),
        ("x", {"uid_0": "x"}, "pairs.columns has uid_0; allowed: prompt, image, rank"),
    ],
)  # fmt: skip
def test_metadata_that_names_no_pairs_is_refused(
    text: str, columns: dict[str, str], says: str, tmp_path: Path
):
    with pytest.raises(PairsError, match=says):
        open_pairs(image_rows(tmp_path, text, **columns))


def test_two_metadata_files_of_one_folder_are_refused(tmp_path: Path):
    spec = image_rows(tmp_path, "file_name,text\na/0.png,a\na/1.png,a")
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(PairsError, match=r"metadata\.csv and metadata\.jsonl; keep one"):
        open_pairs(spec)


# --- tars ----------------------------------------------------------------------------------------


def test_members_of_a_key_are_a_pair(tmp_path: Path):
    spec = make_set("webdataset", tmp_path)
    rows = rows_of(open_pairs(spec))
    assert [(row["prompt"], row["human"]) for row in rows] == [
        ("a cat 0", 0.0), ("a cat 1", 1.0), ("a cat 0", 0.0), ("a cat 1", None),
    ]  # fmt: skip
    assert rows[1]["image_0"] == image(1)
    assert rows[1]["image_1"] == image(2)
    assert rows[2]["uid_0"] == "train-1.tar/0.0.jpg"  # the same key of another tar
    assert rows[3]["image_1"] is None  # cut off: its row stays


def test_a_choice_may_be_a_member_of_its_own(tmp_path: Path):
    pair = {"x/7.txt": "caf\u00e9\n".encode(), "x/7.0.jpg": image(0), "x/7.1.jpg": image(1)}
    write_tar(tmp_path / "all.tar", pair | {"x/7.cls": b"0.5\n"})
    columns = TAR_COLUMNS | {"human": "cls"}
    spec = PairsSpec(kind="webdataset", root=str(tmp_path), split="", columns=columns)
    assert pairs_of(spec) == [("caf\u00e9", "all.tar/x/7.0.jpg", "all.tar/x/7.1.jpg", 0.5)]


@pytest.mark.parametrize(
    ("change", "columns", "says"),
    [
        ({"0.1.jpg": None}, {}, r"pair 0, lacks the columns 1\.jpg; .*it has txt, 0\.jpg, json"),
        ({}, {"human": "json.choice"}, r"lacks the columns json\.choice; did you mean json\.chose"),
        ({"0.json": b'{"chose": 7}'}, {}, r"pair 0: 'json\.chose' has 7; a human choice is"),
        ({"0.json": b'{"chose": "left"}'}, {}, r"'json\.chose' has 'left', but it must"),
        ({}, {"image_1": ""}, "pairs.columns names no column for image_1"),
    ],
)  # fmt: skip
def test_a_first_pair_that_lacks_something_is_refused(
    change: dict[str, bytes | None], columns: dict[str, str], says: str, tmp_path: Path
):
    pair = {"0.txt": b"a cat", "0.0.jpg": image(0), "0.1.jpg": image(1), "0.json": b'{"chose": 1}'}
    write_tar(tmp_path / "train.tar", {n: c for n, c in (pair | change).items() if c is not None})
    spec = PairsSpec(kind="webdataset", root=str(tmp_path), columns=TAR_COLUMNS | columns)
    with pytest.raises(PairsError, match=says):
        open_pairs(spec)


def test_images_of_tars_lie_nowhere_else(tmp_path: Path):
    spec = replace(make_set("webdataset", tmp_path), image_root="/x")
    with pytest.raises(PairsError, match=r"images in the tars; leave pairs\.image_root out"):
        open_pairs(spec)
