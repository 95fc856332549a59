"""docs/pairs.md is true: its trees, filled with small images, are read by its commands."""

import io
import json
import re
import shlex
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.artifacts.schemas import Status
from data.images import FORMATS, MAX_ASPECT, MAX_PIXELS
from data.pairs import built_in_kinds, open_pairs
from data.pairs.image_store import LARGEST_BYTES
from tests.helpers_pairs import KINDS, pickapic, rows_of, write_images
from tests.helpers_train import image
from tests.test_conf import job

TEXT = (Path(__file__).parent.parent / "docs" / "pairs.md").read_text()
LAYOUTS = re.findall(
    r"^### `(\w+)`.*?```text\n(.*?)```.*?```sh\nmake labels (.*?)\n```", TEXT, re.DOTALL | re.M
)


def overrides(command: str) -> list[str]:
    """What is in ARGS, as the shell and make hand it on."""
    words = dict(word.split("=", 1) for word in shlex.split(command))
    return words["ARGS"].split()


def tree(text: str) -> tuple[str, dict[str, list[str]]]:
    """The folder, and its files with their members."""
    folder, *lines = text.splitlines()
    files: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("    "):
            files[list(files)[-1]].append(line.strip())
        else:
            files[line.strip()] = []
    return folder, files


def fill(kind: str, root: Path, files: dict[str, list[str]]) -> None:
    """Make the files; lists name every image of the tree."""
    images = []
    for name, members in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            path.write_bytes(image(len(images)))
            images.append(name.removeprefix("images/"))
        elif path.suffix == ".tar":
            with tarfile.open(path, "w") as archive:
                for member in members:
                    info = tarfile.TarInfo(member)
                    info.size = len(image(1))
                    archive.addfile(info, io.BytesIO(image(1)))
            images += [member.removeprefix("train/") for member in members]
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for member in members:
                    archive.writestr(member, image(1))
            folder = path.with_suffix("").relative_to(root)
            images += [f"{folder}/{Path(member).name}" for member in members]
    for name in files:
        write_list(kind, root / name, images)


def write_list(kind: str, path: Path, images: list[str]) -> None:
    pairs = list(zip(images, images[1:], strict=False))
    if path.suffix == ".jsonl":
        lines = [json.dumps({"prompt": "a", "image_0": a, "image_1": b}) for a, b in pairs]
        path.write_text("\n".join(lines))
    elif path.suffix == ".csv":
        lines = [f'{Path(one).name},"a cat, sitting"' for one in images]
        path.write_text("\n".join(["file_name,caption", *lines]))
    elif path.suffix == ".json":
        extra = {
            "hpdv2": {"human_preference": [1, 0], "file_path": []},
            "hpdv3": {"path1": "", "path2": "", "model1": "x", "model2": "y"},
        }[kind]
        entries = []
        for a, b in pairs:
            paths = {"file_path": [a, b]} if "file_path" in extra else {"path1": a, "path2": b}
            entries.append({"prompt": "a"} | extra | paths)
        path.write_text(json.dumps(entries))
    elif path.suffix == ".parquet":
        count = len(images)
        content = [image(i) for i in range(3)]
        table = {
            "pickapic": pickapic(rows=3, jpg_0=content, jpg_1=content),
            "parquet": pa.table(
                {"text": ["a"] * 3, "left": content, "right": content, "choice": [1.0, 0.0, 0.5]}
            ),
            "imagereward": pa.table(
                {"image_path": images, "prompt_id": ["p"] * count, "prompt": ["a"] * count,
                 "rank": list(range(count))}
            ),
        }[kind]  # fmt: skip
        pq.write_table(table, path)


def test_every_layout_is_described():
    names = {name for name, _, _ in LAYOUTS}
    assert names == set(KINDS) == set(built_in_kinds()) - {"miniature", "own", "mixture"}


@pytest.mark.parametrize(("name", "text", "command"), LAYOUTS, ids=[one[0] for one in LAYOUTS])
def test_the_command_reads_the_tree(name: str, text: str, command: str, tmp_path: Path):
    folder, files = tree(text)
    fill(name, tmp_path / folder.lstrip("/"), files)
    settings = [one.replace("=/data/", f"={tmp_path}/data/") for one in overrides(command)]
    spec = job(*settings).pairs
    assert spec.kind == name
    assert f"{tmp_path}{folder}".rstrip("/") == spec.root
    rows = rows_of(open_pairs(spec))
    assert len(rows) >= 1
    assert all(row["image_0"] and row["image_1"] for row in rows)


def test_a_layout_of_ones_own_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The code and the command of the page, from a package beside the program."""
    section = TEXT.partition("## A layout of your own")[2]
    code, command = (
        re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0]
        for language in ("python", "sh")
    )
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_layout.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    root = tmp_path / "data" / "tables"
    write_images(root, ["a.png", "b.png"])
    (root / "x.tsv").write_text("a cat\ta.png\tb.png\na dog\tb.png\tgone.png\n")
    settings = overrides(command.strip().removeprefix("make labels "))
    spec = job(*(one.replace("=/data/", f"={tmp_path}/data/") for one in settings)).pairs
    rows = rows_of(open_pairs(spec))
    assert [(row["prompt"], row["image_0"], row["image_1"], row["human"]) for row in rows] == [
        ("a cat", image(0), image(1), 1.0), ("a dog", image(1), None, 1.0),
    ]  # fmt: skip


def test_numbers_and_words_are_those_of_the_code():
    for status in Status:
        assert f"| `{status.value}` |" in TEXT
    assert f"more than {MAX_PIXELS // 1_000_000} million pixels" in TEXT
    assert f"one side more than {MAX_ASPECT} times the other" in TEXT
    assert f"above {LARGEST_BYTES >> 20} MiB" in TEXT
    assert ", ".join(FORMATS) in TEXT
