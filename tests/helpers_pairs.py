"""Small pair sets in every layout, and what to read them with."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.pairs.config import Images, PairsSpec
from data.pairs.schema import PAIR, PairSource
from tests.helpers_train import image

KINDS = (
    "pickapic", "hpdv2", "hpdv3", "imagereward", "parquet", "jsonl", "imagefolder", "webdataset",
    "folders",
)  # fmt: skip
"""The published and mapped layouts; of the miniature, `test_first_run` has the rest."""
PICKAPIC = {
    "prompt": "caption", "image_0": "jpg_0", "image_1": "jpg_1", "uid_0": "image_0_uid",
    "uid_1": "image_1_uid", "human": "label_0", "known": "has_label",
}  # fmt: skip
"""Our word -> the column of `pickapic`, for pairs=parquet."""
COLUMNS = {"prompt": "text", "image_0": "left", "image_1": "right", "human": "chose"}

TAR_COLUMNS = {"prompt": "txt", "image_0": "0.jpg", "image_1": "1.jpg", "human": "json.chose"}
FOLDER_COLUMNS = {
    "prompt": "text", "image": "file_name", "rank": "", "human": "chose",
    "image_0": "image_0_file_name", "image_1": "image_1_file_name",
}  # fmt: skip


def pickapic(rows: int = 10, **columns: list[object]) -> pa.Table:
    values = {
        "caption": [f"a cat {i}" for i in range(rows)],
        "image_0_uid": [f"u{i}" for i in range(rows)],
        "image_1_uid": [f"v{i}" for i in range(rows)],
        "jpg_0": [b"0%d" % i for i in range(rows)],
        "jpg_1": [b"1%d" % i for i in range(rows)],
        "label_0": [1.0] * rows,
        "label_1": [0.0] * rows,
        "has_label": [True] * rows,
    } | columns
    return pa.table({name: value for name, value in values.items() if value is not None})


def write_images(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(seed))


def write_tar(path: Path, members: dict[str, bytes], **fields: Any) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))


def rows_of(source: PairSource) -> list[dict[str, Any]]:
    """All pairs; also checks what holds for every source."""
    assert isinstance(source, PairSource)
    rows = []
    for shard in source.shards:
        batches = list(source.read(shard, batch_rows=2))
        assert all(batch.schema.equals(PAIR) for batch in batches)
        table = pa.concat_tables(batches)
        assert table["row"].to_pylist() == list(range(shard.rows))
        groups = source.row_groups(shard)
        assert sum(rows for rows, _ in groups) == shard.rows
        parts = [source.read_row_group(shard, group) for group in range(len(groups))]
        assert [part.num_rows for part in parts] == [rows for rows, _ in groups]
        assert pa.concat_tables(parts).drop_columns("row").equals(table.drop_columns("row"))
        labels = pa.concat_tables(source.read(shard, images=False))
        assert set(labels.schema.names) == set(PAIR.names[:-2])
        rows += table.to_pylist()
    return rows


def write_zip(path: Path, members: dict[str, bytes], **fields: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in fields.items():
                setattr(info, key, value)
            archive.writestr(info, content)


def hpdv2_train(root: Path) -> PairsSpec:
    entries = [
        {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["a.jpg", "b.jpg"]},
        {"human_preference": [0, 1], "prompt": "a dog", "file_path": ["b.jpg", "c.jpg"]},
        {"human_preference": [0, 1], "prompt": "lost", "file_path": ["a.jpg", "gone.jpg"]},
        {"human_preference": [1], "prompt": "short", "file_path": ["a.jpg", "b.jpg"]},
        "no entry at all",
    ]
    root.mkdir(exist_ok=True)
    (root / "train.json").write_text(json.dumps(entries))
    return PairsSpec(kind="hpdv2", root=str(root))


def spec_of(root: Path, kind: str, images: Images, **columns: str) -> PairsSpec:
    mapped = {"uid_0": ""} | COLUMNS | columns
    return PairsSpec(kind=kind, root=str(root), split="", images=images, columns=mapped)


def imagereward(root: Path) -> PairsSpec:
    """Four images of a prompt in two zips, one packed with its folder, one without."""
    names = [f"images/train/train_{1 + i // 2}/{i}.webp" for i in range(4)]
    table = {"image_path": names, "prompt_id": ["p"] * 4, "prompt": ["a"] * 4, "rank": [1, 2, 3, 4]}
    pq.write_table(pa.table(table), root / "metadata-train.parquet")
    (root / "images" / "train").mkdir(parents=True)
    for number, members in ((1, ["train_1/0.webp", "train_1/1.webp"]), (2, ["2.webp", "3.webp"])):
        with zipfile.ZipFile(root / f"images/train/train_{number}.zip", "w") as archive:
            for name in members:
                packing = zipfile.ZIP_DEFLATED if "2" in name else zipfile.ZIP_STORED
                archive.writestr(name, image(int(name[-6])), packing)
    return PairsSpec(kind="imagereward", root=str(root))


def webdataset(root: Path) -> PairsSpec:
    """Two tars with the same keys; the second ends within a pair."""
    members = {}
    for i in range(2):
        members |= {f"{i}.txt": b"a cat %d" % i, f"{i}.0.jpg": image(i)}
        members |= {f"{i}.1.jpg": image(i + 1), f"{i}.json": b'{"chose": %d}' % (i % 2)}
    write_tar(root / "train-0.tar", members)
    write_tar(root / "train-1.tar", {name: members[name] for name in list(members)[:6]})
    return PairsSpec(kind="webdataset", root=str(root), columns=TAR_COLUMNS)


def imagefolder(root: Path) -> PairsSpec:
    """Five rows, each a pair of the same images."""
    write_images(root, ["0.png", "1.png"])
    names = {"image_0_file_name": "0.png", "image_1_file_name": "1.png"}
    lines = [json.dumps({"text": f"a cat {i}", "chose": i / 4} | names) for i in range(5)]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return PairsSpec(kind="imagefolder", root=str(root), split="", columns=FOLDER_COLUMNS)


EXCHANGED = {"webdataset": webdataset, "imagefolder": imagefolder}


def make_set(kind: str, root: Path) -> PairsSpec:
    """A small set of each layout."""
    if kind == "pickapic":
        (root / "deep").mkdir()
        table = pickapic(rows=9, jpg_0=[image(i) for i in range(9)])
        pq.write_table(table, root / "deep" / "train-1.parquet", row_group_size=4)
        pq.write_table(table, root / "train-0.parquet", row_group_size=2)
        return PairsSpec(kind=kind, root=str(root))
    if kind == "imagereward":
        return imagereward(root)
    if kind == "hpdv2":
        names = ["a.jpg", "b.jpg", "c.jpg"]
        write_tar(root / "train.tar", {f"train/{n}": image(i) for i, n in enumerate(names)})
        return hpdv2_train(root)
    if kind == "hpdv3":
        entry = {"prompt": "a cat", "path1": "images/0.jpg", "path2": "images/1.jpg"}
        (root / "train.json").write_text(json.dumps([entry] * 5))
        write_images(root, ["images/0.jpg", "images/1.jpg"])
        return PairsSpec(kind=kind, root=str(root))
    if kind == "folders":
        write_images(root, ["0_0.png", "0_1.png", "0_2.png", "1_0_w.png", "1_1_l.png"])
        (root / "0.txt").write_text("a cat on a mat")
        (root / "1.txt").write_text("a dog")
        return PairsSpec(kind=kind, root=str(root), split="")
    if kind in EXCHANGED:
        return EXCHANGED[kind](root)
    rows = [
        {"text": f"cat {i}", "left": f"p/{i}.png", "right": "gone\0.png", "chose": 1}
        for i in range(5)
    ]
    write_images(root, [row["left"] for row in rows])
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), root / "x.parquet")
    else:
        (root / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return spec_of(root, kind, Images.paths)
