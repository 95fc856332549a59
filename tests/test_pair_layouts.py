"""Every layout in its real schema: order, human choice, missing images, clear refusals."""

import base64
import io
import json
import math
import re
import tarfile
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pairs import image_list, image_store, open_pairs
from data.pairs.config import Images, PairsSpec
from data.pairs.rankings import ranking_rows
from data.pairs.schema import PairsError, image_key
from data.storage import open_store
from data.storage.base import StoreError
from tests.helpers_pairs import (
    hpdv2_train,
    rows_of,
    spec_of,
    write_images,
    write_tar,
    write_zip,
)
from tests.helpers_train import image

# --- HPDv2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_hpdv2_choices_of_two(tmp_path: Path, packed: bool):
    spec = hpdv2_train(tmp_path)
    names = ["a.jpg", "b.jpg", "c.jpg"]
    if packed:
        content = {f"./train/{name}": image(seed) for seed, name in enumerate(names)}
        write_tar(tmp_path / "train.tar", content)
    else:
        write_images(tmp_path / "train", names)
    rows = rows_of(open_pairs(spec))
    assert [row["prompt"] for row in rows] == ["a cat", "a dog", "lost", "short", None]
    assert [row["human"] for row in rows] == [1.0, 0.0, 0.0, None, None]
    assert [(row["uid_0"], row["uid_1"]) for row in rows[:3]] == [
        ("a.jpg", "b.jpg"), ("b.jpg", "c.jpg"), ("a.jpg", "gone.jpg"),
    ]  # fmt: skip
    assert (rows[1]["image_0"], rows[1]["image_1"]) == (image(1), image(2))
    assert (rows[2]["image_0"], rows[2]["image_1"]) == (image(0), None)
    assert (tmp_path / "train.tar.index").exists() is packed


def test_hpdv2_rankings_give_all_pairs(tmp_path: Path):
    entry = {
        "prompt": "a cat",
        "image_path": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
        "rank": [2.5, 1, 2.5, 4],
        "raw_annotations": [{"rank": [2, 1, 3, 4], "user_hash": "x"}],
    }
    (tmp_path / "test.json").write_text(json.dumps([entry]))
    write_images(tmp_path / "test", entry["image_path"])
    rows = rows_of(open_pairs(PairsSpec(kind="hpdv2", root=str(tmp_path), split="test")))
    assert [(r["uid_0"][0] + r["uid_1"][0], r["human"]) for r in rows] == [
        ("ab", 0.0), ("ac", 0.5), ("ad", 1.0), ("bc", 1.0), ("bd", 1.0), ("cd", 1.0),
    ]  # fmt: skip


@given(st.lists(st.integers(1, 4), min_size=2, max_size=7))
def test_a_ranking_gives_each_pair_once_and_turned_round_the_opposite(ranks: list[int]):
    names = [str(i) for i in range(len(ranks))]
    rows = list(ranking_rows("x", "a cat", names, ranks))
    assert len({frozenset(row[1:3]) for row in rows}) == len(rows) == math.comb(len(ranks), 2)
    turned = {row[1:3]: row[3] for row in ranking_rows("x", "a cat", names[::-1], ranks[::-1])}
    assert all(row[3] == 1 - turned[row[2], row[1]] for row in rows)


@pytest.mark.parametrize("ranks", [[1, None], [float("nan"), 1]])
def test_ranks_that_are_unknown_are_no_choice(ranks: list[Any]):
    assert [row[3] for row in ranking_rows("x", "a cat", ["x", "y"], ranks)] == [None]


@pytest.mark.parametrize(
    ("prompt", "images", "ranks", "says"),
    [
        ("a cat", ["x", "y"], ["1", "2"], "the list of ranks or choices has '1', but it must be a"),
        ("a cat", ["x", "y"], "12", "the list of ranks or choices is '12'; it must be a list"),
        ("a cat", ["x", 7], [1, 2], "the list of images has 7, but it must be text"),
        (["a cat"], ["x", "y"], [1, 2], r"the prompt has \['a cat'\], but it must be text"),
    ],
)
def test_rankings_of_other_types_are_refused(prompt: Any, images: Any, ranks: Any, says: str):
    with pytest.raises(PairsError, match=f"x.json, entry 3: {says}"):
        list(ranking_rows("x.json, entry 3", prompt, images, ranks))


# --- HPDv3 ---------------------------------------------------------------------------------------


def test_hpdv3_winners_stand_on_either_side(tmp_path: Path):
    entries = [
        {
            "prompt": f"cat {i}", "choice_dist": [12, 7] if i % 2 else None, "confidence": None,
            "path1": f"images/w{i}.jpg", "path2": f"images/l{i}.jpg", "model1": "x", "model2": "y",
        }
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(entries))
    write_images(tmp_path, ["images/w0.jpg", "images/l0.jpg"])
    spec = PairsSpec(kind="hpdv3", root=str(tmp_path), side_seed=3)
    rows = rows_of(open_pairs(spec))
    for i, row in enumerate(rows):
        swapped = blake2b(f"3/{i}".encode(), digest_size=1).digest()[0] % 2 == 1
        winner = row["uid_0"] if row["human"] == 1 else row["uid_1"]
        assert winner == f"images/w{i}.jpg"
        assert {row["uid_0"], row["uid_1"]} == {f"images/w{i}.jpg", f"images/l{i}.jpg"}
        assert row["human"] == (0.0 if swapped else 1.0)
    assert 8 < sum(row["human"] for row in rows) < 32
    spec.side_seed = 4
    other = open_pairs(spec)
    assert [row["human"] for row in rows_of(other)] != [row["human"] for row in rows]
    assert other.shards[0].reading == "sides by seed 4"  # scores of other sides are not reused


# --- ImageRewardDB -------------------------------------------------------------------------------


def test_imagereward_images_of_a_prompt_are_paired_by_rank(tmp_path: Path):
    images = [("p1", "a", 2), ("p2", "d", 1), ("p1", "b", 1), ("p1", "c", 2), ("p2", "e", 3)]
    table = pa.table(
        {
            "image_path": [f"train/train_1/{name}.webp" for _, name, _ in images] + ["alone.webp"],
            "prompt_id": [prompt for prompt, _, _ in images] + ["p3"],
            "prompt": [f"prompt {prompt}" for prompt, _, _ in images] + ["prompt p3"],
            "classification": ["Animals"] * 6,
            "image_amount_in_total": [3, 2, 3, 3, 2, 1],
            "rank": [rank for _, _, rank in images] + [1],
            "overall_rating": [5] * 6,
            "image_text_alignment_rating": [5] * 6,
            "fidelity_rating": [5] * 6,
        }
    )
    pq.write_table(table, tmp_path / "metadata-train.parquet")
    write_images(tmp_path / "images/train/train_1", [f"{name}.webp" for name in "abcd"])
    rows = rows_of(open_pairs(PairsSpec(kind="imagereward", root=str(tmp_path))))
    assert [(r["prompt"], r["uid_0"][-6] + r["uid_1"][-6], r["human"]) for r in rows] == [
        ("prompt p1", "ab", 0.0), ("prompt p1", "ac", 0.5), ("prompt p1", "bc", 1.0),
        ("prompt p2", "de", 1.0),
    ]  # fmt: skip
    assert rows[2]["image_1"] == image(2)
    assert rows[3]["image_1"] is None


# --- any columns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("images", list(Images))
def test_any_columns(tmp_path: Path, kind: str, images: Images):
    names = [(f"p/{2 * i}.png", f"p/{2 * i + 1}.png") for i in range(5)]
    write_images(tmp_path, [name for pair in names for name in pair])
    names[4] = ("p/8.png", "../secret.png")
    (tmp_path.parent / "secret.png").write_bytes(image(99))
    sides: list[list[Any]] = [list(column) for column in zip(*names, strict=True)]
    if images is Images.inline:
        sides = [[image(2 * i + side) for i in range(5)] for side in (0, 1)]
        sides[1][4] = None
    rows = [
        {"text": f"cat {i}", "left": sides[0][i], "right": sides[1][i], "chose": chose}
        for i, chose in enumerate([1.0, 0.0, 0.5, None, 1.0])
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet", row_group_size=2)
    else:
        lines = [
            json.dumps(row, default=lambda content: base64.b64encode(content).decode())
            for row in rows
        ]
        (tmp_path / "some.jsonl").write_text("\n\n".join(lines))
    rows = rows_of(open_pairs(spec_of(tmp_path, kind, images)))
    assert [row["prompt"] for row in rows] == [f"cat {i}" for i in range(5)]
    assert [row["human"] for row in rows] == [1.0, 0.0, 0.5, None, 1.0]
    assert [row["image_0"] for row in rows] == [image(2 * i) for i in range(5)]
    assert [row["image_1"] for row in rows] == [*(image(2 * i + 1) for i in range(4)), None]
    uid = names[2][1] if images is Images.paths else image_key(image(5)).hex()
    assert rows[2]["uid_1"] == uid


def test_hugging_face_image_columns(tmp_path: Path):
    images = [{"bytes": image(seed), "path": None} for seed in (1, 2)]
    table = pa.table({"text": ["a", "b"], "left": images, "right": images, "chose": [1, 0]})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = rows_of(open_pairs(spec_of(tmp_path, "parquet", Images.inline)))
    assert [row["image_1"] for row in rows] == [image(1), image(2)]
    assert [row["human"] for row in rows] == [1.0, 0.0]


def test_lines_that_are_no_pairs_keep_their_rows(tmp_path: Path):
    good = {"text": "a cat", "left": "0.png", "right": "1.png", "chose": 1, "sure": True}
    write_images(tmp_path, ["0.png", "1.png"])
    lines = [
        json.dumps(good), "{torn", "[1]", json.dumps(good | {"sure": False}),
        json.dumps(good | {"left": None, "right": "bad\0name", "text": "\ud800"}),
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    spec = spec_of(tmp_path, "jsonl", Images.paths, known="sure")
    rows = rows_of(open_pairs(spec))
    assert [row["prompt"] for row in rows] == ["a cat", None, None, "a cat", "?"]
    assert [row["human"] for row in rows] == [1.0, None, None, None, 1.0]
    assert [row["image_1"] is None for row in rows] == [False, True, True, False, True]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ODD = st.sampled_from(["0.png", "1.png", 1, 0, 10**400, "\ud800", "a\0b", "../0.png"])
ANYTHING = st.recursive(
    LEAVES | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
LINES = ANYTHING | st.fixed_dictionaries(
    dict.fromkeys(["text", "left", "right", "chose", "uid"], ANYTHING)
)
ENTRIES = ANYTHING | st.fixed_dictionaries(
    dict.fromkeys(["prompt", "file_path", "human_preference"], ANYTHING)
)
NOISE = st.binary(max_size=20).filter(lambda noise: bool(b"\n" not in noise and noise.strip()))


@settings(max_examples=50, deadline=None)
@given(st.lists(LINES, max_size=6), NOISE)
def test_any_lines_keep_their_rows(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], noise: bytes
):
    root = tmp_path_factory.mktemp("lines")
    write_images(root, ["0.png", "1.png"])
    good = {"text": "a", "left": "0.png", "right": "1.png", "chose": None, "uid": None}
    lines = [json.dumps(value).encode() for value in [good, *values]]
    (root / "x.jsonl").write_bytes(b"\n".join([*lines, noise]))
    try:
        source = open_pairs(spec_of(root, "jsonl", Images.paths, uid_0="uid"))
    except PairsError as error:
        refused = str(error)
        assert re.search(r"x\.jsonl, line \d+: '\w+' has .*(must be|a human choice is 1)", refused)
        return
    rows = rows_of(source)
    assert len(rows) == len(values) + 2
    assert all(row["human"] is None or 0 <= row["human"] <= 1 for row in rows)
    assert {row["image_0"] for row in rows} <= {None, image(0), image(1)}


@settings(max_examples=50, deadline=None)
@given(st.lists(ENTRIES, max_size=6), st.sampled_from(["hpdv2", "hpdv3"]))
def test_any_list_gives_a_row_for_each_entry(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], kind: str
):
    root = tmp_path_factory.mktemp("list")
    write_images(root, ["0.png", "1.png"])
    good = {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [1, 0],
            "path1": "0.png", "path2": "1.png"}  # fmt: skip
    (root / "train.json").write_text(json.dumps([good, *values]))
    try:
        rows = rows_of(open_pairs(PairsSpec(kind=kind, root=str(root))))
    except PairsError as error:
        refused = str(error)
        assert re.search(r"train\.json, entry \d+: .* must be ", refused)
        return
    assert len(rows) >= len(values) + 1
    assert {row["human"] for row in rows} <= {None, 0.0, 0.5, 1.0}


def test_long_lists_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_list, "GROUP_ROWS", 3)
    monkeypatch.setattr(image_list, "SHARD_ROWS", 6)
    monkeypatch.setattr("data.pairs.jsonl.GROUP_ROWS", 3)
    write_images(tmp_path, ["0.png"])
    lines = [
        json.dumps({"text": f"cat {i}", "left": "0.png", "right": "0.png", "chose": 1})
        for i in range(14)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    spec = spec_of(tmp_path, "jsonl", Images.paths)
    source = open_pairs(spec)
    assert [(shard.name, shard.rows) for shard in source.shards] == [
        ("x.jsonl#00000", 6), ("x.jsonl#00001", 6), ("x.jsonl#00002", 2),
    ]  # fmt: skip
    size = 2 * len(image(0))
    assert source.row_groups(source.shards[1]) == [(3, 3 * size), (3, 3 * size)]
    assert [row["prompt"] for row in rows_of(source)] == [f"cat {i}" for i in range(14)]
    spec.max_pairs = 7
    assert sum(shard.rows for shard in open_pairs(spec).shards) == 12


# --- what is refused -----------------------------------------------------------------------------


def test_hostile_tar_members_are_refused(tmp_path: Path):
    spec = hpdv2_train(tmp_path)
    for name in ("../../outside.jpg", "/etc/passwd", "train/../../x.jpg"):
        write_tar(tmp_path / "train.tar", {"train/a.jpg": image(0), name: b"evil"})
        with pytest.raises(StoreError, match=r"train\.tar has a member that no image set needs"):
            open_pairs(spec)
        assert not (tmp_path / "train.tar.index").exists()
    write_tar(tmp_path / "train.tar", {"train/a.jpg": b""}, type=tarfile.FIFOTYPE)
    with pytest.raises(StoreError, match="no image set needs"):
        open_pairs(spec)


def test_zips_are_read_in_place(tmp_path: Path):
    spec = hpdv2_train(tmp_path)
    names = {"train/a.jpg": image(0), "train/b.jpg": image(1)}
    write_zip(tmp_path / "one.zip", names)
    write_zip(tmp_path / "train.zip", {"c.jpg": image(2)}, compress_type=zipfile.ZIP_STORED)
    rows = rows_of(open_pairs(spec))
    assert (rows[0]["image_0"], rows[1]["image_0"]) == (image(0), image(1))
    assert rows[1]["image_1"] == image(2)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("../../outside.jpg", {}, "leads out of the archive"),
        ("/etc/passwd", {}, "leads out of the archive"),
        ("..\\outside.jpg", {}, "leads out of the archive"),
        ("a.jpg", {"compress_type": zipfile.ZIP_LZMA}, "packed by method 14"),
        ("a.jpg", {"flag_bits": 1}, "is encrypted"),
    ],
)
def test_hostile_zip_members_are_refused(
    tmp_path: Path, name: str, fields: dict[str, int], message: str
):
    spec = hpdv2_train(tmp_path)
    write_zip(tmp_path / "train.zip", {"train/c.jpg": image(0)})
    write_zip(tmp_path / "x.zip", {name: b"evil"}, **fields)
    if "flag_bits" in fields:  # the writer clears it
        content = bytearray((tmp_path / "x.zip").read_bytes())
        content[content.index(b"PK\1\2") + 8] |= 1
        (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(StoreError, match=rf"x\.zip has a member that no image.*{message}"):
        open_pairs(spec)


def test_links_in_a_zip_are_no_images(tmp_path: Path):
    spec = hpdv2_train(tmp_path)
    write_zip(tmp_path / "train.zip", {"a.jpg": b"b.jpg"}, external_attr=0o120777 << 16)
    write_zip(tmp_path / "more.zip", {"b.jpg": image(1)})
    first = rows_of(open_pairs(spec))[0]
    assert (first["image_0"], first["image_1"]) == (None, image(1))


def test_a_bomb_in_a_zip_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither one that says how large it is, nor one that lies."""
    spec = hpdv2_train(tmp_path)
    monkeypatch.setattr(image_store, "LARGEST_BYTES", 1 << 20)
    write_zip(tmp_path / "train.zip", {"a.jpg": bytes(8 << 20), "b.jpg": image(1)})
    first = rows_of(open_pairs(spec))[0]
    assert (first["image_0"], first["image_1"]) == (None, image(1))
    content = bytearray((tmp_path / "train.zip").read_bytes())
    size = content.index(b"PK\1\2") + 24
    content[size : size + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "train.zip").write_bytes(content)
    with pytest.raises(StoreError, match=r"train\.zip: the member at byte 0 is damaged"):
        rows_of(open_pairs(spec))


@pytest.mark.parametrize("at", ["header", "content"])
def test_a_damaged_zip_is_named(tmp_path: Path, at: str):
    """Not taken for a bad image: another copy of the file would have a good one."""
    spec = hpdv2_train(tmp_path)
    write_zip(tmp_path / "train.zip", {"a.jpg": image(0), "b.jpg": image(1)})
    content = bytearray((tmp_path / "train.zip").read_bytes())
    content[0 if at == "header" else 120] ^= 1
    (tmp_path / "train.zip").write_bytes(content)
    with pytest.raises(StoreError, match=r"train\.zip: the member at byte 0 is damaged .* again"):
        rows_of(open_pairs(spec))
    (tmp_path / "train.zip").write_bytes(content[:-30])
    with pytest.raises(StoreError, match=r"train\.zip is not a readable zip file"):
        open_pairs(spec)


def test_links_in_a_tar_are_no_images(tmp_path: Path):
    spec = hpdv2_train(tmp_path)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        link = tarfile.TarInfo("train/b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
        info = tarfile.TarInfo("train/a.jpg")
        info.size = len(image(0))
        archive.addfile(info, io.BytesIO(image(0)))
    first = rows_of(open_pairs(spec))[0]
    assert (first["image_0"], first["image_1"]) == (image(0), None)


def test_the_index_of_a_tar_is_used_until_the_tar_changes(tmp_path: Path):
    spec = hpdv2_train(tmp_path)
    tar, index = tmp_path / "train.tar", tmp_path / "train.tar.index"
    write_tar(tar, {"train/a.jpg": image(0)})
    open_pairs(spec)
    value = json.loads(index.read_text())
    value["members"]["train/b.jpg"] = value["members"]["train/a.jpg"]
    index.write_text(json.dumps(value))
    assert rows_of(open_pairs(spec))[0]["image_1"] == image(0)
    value["members"]["train/b.jpg"] = [0, 1 << 40]  # beyond the end: built anew
    index.write_text(json.dumps(value))
    assert rows_of(open_pairs(spec))[0]["image_1"] is None
    write_tar(tar, {"train/a.jpg": image(5), "train/b.jpg": image(6)})
    assert rows_of(open_pairs(spec))[0]["image_1"] == image(6)
    tar.write_bytes(b"no tar")
    with pytest.raises(StoreError, match="not a readable tar file"):
        open_pairs(spec)


def test_a_name_in_two_tars_names_no_image(tmp_path: Path):
    spec = hpdv2_train(tmp_path)
    write_tar(tmp_path / "train.tar", {"a.jpg": image(0), "b.jpg": image(1)})
    write_tar(tmp_path / "test.tar", {"a.jpg": image(5)})
    first = rows_of(open_pairs(spec))[0]
    assert (first["image_0"], first["image_1"]) == (None, image(1))


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tar.gz.000", "train.tgz"])
def test_a_compressed_tar_says_how_to_convert_it(tmp_path: Path, name: str):
    spec = hpdv2_train(tmp_path)
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(PairsError, match=r"cat train\.t\*gz\* \| gunzip > train\.tar"):
        open_pairs(spec)


def test_images_elsewhere_are_named(tmp_path: Path):
    spec = hpdv2_train(tmp_path / "lists")
    with pytest.raises(PairsError, match=r"none of the first images .* 'a\.jpg'; .*image_root"):
        open_pairs(spec)
    write_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    spec.image_root = str(tmp_path / "images")
    assert rows_of(open_pairs(spec))[1]["image_1"] == image(2)
    spec.image_root = str(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"image_root=.*nowhere is not a folder"):
        open_pairs(spec)


def test_paths_stay_below_the_root(tmp_path: Path):
    write_images(tmp_path / "root", ["in.png"])
    write_images(tmp_path, ["out.png"])
    opened = image_store.open_images(
        open_store("pairs.root", str(tmp_path / "root")), ("",), ["in.png"]
    )
    inside = str(tmp_path / "root" / "in.png")
    assert opened.read(inside) == opened.read("./in.png") == image(0)
    for path in ("../out.png", str(tmp_path / "out.png"), "a/../../out.png", "", ".", "\0"):
        assert opened.read(path) is None


def test_too_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_images(tmp_path, ["in.png"])
    monkeypatch.setattr(image_store, "LARGEST_BYTES", 10)
    store = open_store("pairs.root", str(tmp_path))
    assert image_store.open_images(store, ("",), ["in.png"]).read("in.png") is None


JSON_LINE = json.dumps({"txt": "a", "left": "0.png", "right": "0.png", "chose": 1})
PARQUET = pa.table({"text": ["a"], "left": [b"x"], "right": [b"y"], "chose": [1]})


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("jsonl", "x.jsonl", JSON_LINE, "first line, lacks the columns text; did you mean txt"),
        ("jsonl", "x.jsonl", "[]", "first line is no JSON object"),
        ("jsonl", "x.json", "", r"no \*\.jsonl"),
        ("jsonl", "x.jsonl", JSON_LINE.replace("txt", "text").replace(": 1", ": -1"), "has -1"),
        ("parquet", "x.parquet", PARQUET.rename_columns(["tekst", "left", "right", "chose"]),
         "lacks the columns text; did you mean tekst"),
        ("parquet", "x.parquet", PARQUET.set_column(1, "left", [["a.png"]]),
         "column left is string, but image_0 must be encoded bytes; set pairs.images=paths if .*"
         r"or name another column \(pairs\.columns\.image_0="),
        ("parquet", "x.parquet", PARQUET.set_column(3, "chose", [[-1]]),
         "chose has -1 in row 0; a human"),
        ("parquet", "x.parquet", PARQUET.set_column(3, "chose", [["left"]]),
         "column chose is string, but human must be a number"),
        ("parquet", "x.parquet", "torn", "not a readable Parquet file"),
        ("hpdv2", "train.json", '[{"promt": "a", "file_path": [], "human_preference": []}]',
         "lacks the columns prompt; did you mean promt"),
        ("hpdv2", "train.json", '{"a": 1}', "not the list of objects"),
        ("hpdv2", "train.json", "[", "is no JSON file"),
        ("hpdv2", "train.json", "[]", "hold no pairs"),
        ("hpdv3", "train.json", '[{"prompt": "a", "path_1": "x", "path2": "y"}]',
         "lacks the columns path1; did you mean path_1"),
        ("imagereward", "metadata-train.parquet", PARQUET, "lacks the columns image_path"),
        ("imagereward", "train.parquet", PARQUET, r"no metadata-train\*\.parquet"),
    ],
)  # fmt: skip
def test_other_contents_are_refused(
    tmp_path: Path, kind: str, name: str, content: str | pa.Table, message: str
):
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        pq.write_table(content, tmp_path / name)
    spec = spec_of(tmp_path, kind, Images.inline)
    spec.split = "" if kind in ("jsonl", "parquet") else "train"
    with pytest.raises(PairsError, match=message):
        open_pairs(spec)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "x"}, "pairs.columns has promt; .*allowed: prompt, image_0"),
        ({"prompt": "text", "image_0": ""}, "names no column for image_0, image_1"),
    ],
)
def test_wrong_maps_are_refused(tmp_path: Path, columns: dict[str, str], message: str):
    spec = PairsSpec(kind="parquet", root=str(tmp_path), split="", columns=columns)
    with pytest.raises(PairsError, match=message):
        open_pairs(spec)
