"""Which files a split has: whole names, folders, links, and what is hidden."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError
from generate.config import PromptsKind, PromptsSpec
from generate.prompts.prompt_set import load_prompts
from tests.helpers_pairs import PICKAPIC, pickapic


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pickapic(rows=1), root / name)


def files_of(root: Path, split: str, kind: str = "pickapic") -> list[str]:
    columns = PICKAPIC if kind == "parquet" else {}
    spec = PairsSpec(kind=kind, root=str(root), split=split, columns=columns)
    return [shard.file for shard in open_pairs(spec).shards]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["validation_unique-00000-of-00001-ab.parquet", "validation-00000-of-00002.parquet"],
         "validation", ["validation-00000-of-00002.parquet"]),
        (["train-00000-of-00645-b66ac786bf6fb553.parquet", "train_old-0.parquet",
          "training-0.parquet", "train2-00000-of-00001.parquet"],
         "train", ["train-00000-of-00645-b66ac786bf6fb553.parquet"]),
        (["train.parquet", "train_1.parquet", "train.2.parquet", "trainers.parquet"],
         "train", ["train.2.parquet", "train.parquet", "train_1.parquet"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"],
         "train", ["default/train/0000.parquet"]),
        (["train/part-0.parquet", "train/validation-0.parquet", "test/part-0.parquet"],
         "train", ["train/part-0.parquet"]),
        (["train.parquet/part-0.parquet"], "train", ["train.parquet/part-0.parquet"]),
        (["a-0.parquet", "b-0.parquet"], "", ["a-0.parquet", "b-0.parquet"]),
        (["train-0.parquet", "test-0.parquet"], "all", ["test-0.parquet", "train-0.parquet"]),
    ],
)  # fmt: skip
def test_a_split_is_a_whole_name(names: list[str], split: str, expected: list[str], tmp_path: Path):
    write(tmp_path, *names)
    assert files_of(tmp_path, split) == expected


def test_the_folder_that_is_given_may_be_the_split(tmp_path: Path):
    write(tmp_path / "train", "0000.parquet")
    assert files_of(tmp_path / "train", "train") == ["0000.parquet"]
    with pytest.raises(PairsError, match=r"no test\*\.parquet under .*it has 0000\.parquet; the"):
        files_of(tmp_path / "train", "test")


@pytest.mark.parametrize(
    "names",
    [("default/train/0.parquet", "default/test/0.parquet"), ("train-0.parquet", "test-0.parquet")],
)
def test_several_splits_are_not_mixed_unasked(names: tuple[str, ...], tmp_path: Path):
    write(tmp_path, *names)
    with pytest.raises(PairsError, match=r"splits test, train; choose one, as pairs\.split=train"):
        files_of(tmp_path, "", "parquet")


def test_hidden_files_are_skipped(tmp_path: Path):
    write(tmp_path, "train-0.parquet", ".ipynb_checkpoints/train-0-checkpoint.parquet")
    (tmp_path / "._train-0.parquet").write_bytes(b"\0\5\x16\7")
    assert files_of(tmp_path, "train") == ["train-0.parquet"]
    assert files_of(tmp_path, "", "parquet") == ["train-0.parquet"]


def test_links_are_followed_and_never_in_circles(tmp_path: Path):
    write(tmp_path / "elsewhere", "train-1.parquet")
    root = tmp_path / "root"
    write(root, "a/train-0.parquet")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(root / "a")  # a folder that is there already
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    assert files_of(root, "train") == ["a/train-0.parquet", "b/train-1.parquet"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path):
    write(tmp_path, "train-0.parquet")
    (tmp_path / "train-1.parquet").symlink_to("../objects/1")
    with pytest.raises(ValueError, match=r"train-1\.parquet is a link to \.\./objects/1, which is"):
        files_of(tmp_path, "train")


def test_prompts_of_a_folder_have_the_same_splits(tmp_path: Path):
    write(tmp_path, "default/test/0.parquet", "default/test_unique/0.parquet")
    (tmp_path / "default/test/._0.parquet").write_bytes(b"\0")
    spec = PromptsSpec(name="x", kind=PromptsKind.table, path=str(tmp_path), split="test")
    assert load_prompts(spec).counts == "prompts 1 · empty 0 · repeated 0 · total 1"
    spec.split = ""
    with pytest.raises(PairsError, match=r"choose one, as evaluate\.prompts\.split=test_unique"):
        load_prompts(spec)
