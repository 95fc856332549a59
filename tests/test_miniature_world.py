"""The miniature world: its words and images, its oracle, and the pair files it writes."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.miniature import scenes
from data.miniature.oracle import attributes, oracle
from data.miniature.pairs import PICKAPIC, write_pairs
from data.miniature.scenes import Look, Scene
from data.miniature.taste import HUMAN
from data.pairs.miniature import ensure_pairs

SCENE = Scene("small", "red", "circle", "left", "blue")


def images(number: int, seed: int) -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    every = scenes.all_scenes()
    chosen = [every[i] for i in rng.integers(len(every), size=number)]
    return [(scene, scenes.render(scene, Look(), rng)) for scene in chosen]


def test_a_prompt_reads_back_into_its_scene():
    assert SCENE.prompt == "a small red circle at the left on a blue background"
    assert all(scenes.parse(scene.prompt) == scene for scene in scenes.all_scenes())


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a huge red circle at the left on a blue background",
        "a small red circle at the left on a red background",
        "A small red circle at the left on a blue background",
    ],
)
def test_other_sentences_are_refused(prompt: str):
    with pytest.raises(ValueError, match="not a prompt of the miniature world"):
        scenes.parse(prompt)


def test_splits_are_disjoint_and_large_enough():
    splits = {name: set(scenes.prompts(name)) for name in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 3360
    assert len(splits["validation"]) >= 200
    assert len(splits["test"]) >= 500


def test_splits_never_move():
    """Weights in the repository were trained on this split; another one would leak."""
    listing = "\n".join(scenes.prompts("test")).encode()
    assert hashlib.blake2b(listing, digest_size=8).hexdigest() == "5fda3ed54daab833"


def test_a_fault_changes_one_attribute_and_stays_in_the_world():
    rng = np.random.default_rng(0)
    for attribute in scenes.ATTRIBUTES:
        for _ in range(20):
            wrong = scenes.with_fault(SCENE, attribute, rng)
            assert scenes.parse(wrong.prompt) == wrong
            assert replace(wrong, **{attribute: getattr(SCENE, attribute)}) == SCENE
            assert wrong != SCENE


def test_the_oracle_reads_clean_images():
    rows = [attributes(image, scene.prompt) for scene, image in images(150, seed=1)]
    for name in scenes.ATTRIBUTES:
        assert np.mean([row[name] > 0.5 for row in rows]) > 0.97


def test_every_fault_lowers_the_oracle_by_about_a_fifth():
    rng = np.random.default_rng(2)
    for scene, image in images(30, seed=3):
        right = oracle(image, scene.prompt)
        for attribute in scenes.ATTRIBUTES:
            wrong = scenes.render(scenes.with_fault(scene, attribute, rng), Look(), rng)
            assert oracle(wrong, scene.prompt) < right - 0.1


def test_the_oracle_sees_through_a_poor_look():
    rng = np.random.default_rng(4)
    poor = Look(saturation=0.6, contrast=0.7, brightness=-0.05, blur=1.0)
    scores = [oracle(scenes.render(scene, poor, rng), scene.prompt) for scene, _ in images(100, 5)]
    assert np.mean(scores) > 0.85


@pytest.mark.parametrize("shade", [0, 127, 255])
def test_an_empty_image_shows_nothing(shade: int):
    assert oracle(np.full((64, 64, 3), shade, np.uint8), SCENE.prompt) == 0


def test_the_oracle_survives_pure_noise():
    noise = np.random.default_rng(6).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert 0 <= oracle(noise, SCENE.prompt) <= 1


def test_appeal_falls_with_every_flaw():
    best = Look()
    flaws = {"saturation": 0.5, "contrast": 0.5, "brightness": 0.1, "blur": 1.0}
    assert best.appeal == pytest.approx(1)
    assert all(replace(best, **{name: value}).appeal < 1 for name, value in flaws.items())


def test_humans_mind_faults_and_looks():
    rng = np.random.default_rng(7)
    good = scenes.SceneImage(scenes.render(SCENE, Look(), rng), SCENE, Look(), 1.0)
    wrong = replace(good, scene=replace(SCENE, colour="green"))
    dull = replace(good, look=Look(saturation=0.3))
    for worse in (wrong, dull):
        assert HUMAN.pleasure(worse, SCENE.prompt) < HUMAN.pleasure(good, SCENE.prompt)


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 300, seed=5, shards=3)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return pa.concat_tables(map(pq.read_table, sorted(folder.glob("train-*.parquet")))).to_pylist()


def opens(content: bytes) -> bool:
    try:
        Image.open(io.BytesIO(content)).load()
    except OSError:
        return False
    return True


def test_pair_files_have_the_schema_of_pickapic(pair_folder: Path):
    files = sorted(path.name for path in pair_folder.iterdir())
    assert files == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    for name in files:
        assert pq.read_schema(pair_folder / name).equals(PICKAPIC)
        assert pq.read_metadata(pair_folder / name).num_rows == 100


def test_the_same_seed_gives_the_same_bytes(pair_folder: Path, tmp_path: Path):
    write_pairs(tmp_path, 300, seed=5, shards=3)
    for path in pair_folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_every_defect_occurs_and_most_rows_are_sound(pair_folder: Path):
    rows = rows_of(pair_folder)
    images = [row[f"jpg_{i}"] for row in rows for i in (0, 1)]
    assert sum(content == b"" for content in images) == 1
    assert sum(content.startswith(b"<html") for content in images) == 1
    assert sum(content.startswith(b"\x89PNG") for content in images) == 1
    assert sum(not opens(content) for content in images) == 3
    assert sum(row["caption"] == "" for row in rows) == 1


def test_labels_tell_winners_ties_and_missing_choices(pair_folder: Path):
    rows = rows_of(pair_folder)
    assert {row["label_0"] for row in rows} == {0.0, 0.5, 1.0}
    assert all(row["label_0"] + row["label_1"] == 1 for row in rows)
    assert 0.05 < np.mean([row["label_0"] == 0.5 for row in rows]) < 0.18
    assert 0 < sum(not row["has_label"] for row in rows) < 15
    for row in rows:
        if row["label_0"] != 0.5:
            assert row["best_image_uid"] == row["image_0_uid" if row["label_0"] else "image_1_uid"]


def test_an_image_stands_in_several_pairs_of_one_prompt(pair_folder: Path):
    rows = [row for row in rows_of(pair_folder) if row["caption"]]
    prompts: dict[str, set[str]] = {}
    for row in rows:
        for i in (0, 1):
            prompts.setdefault(row[f"image_{i}_uid"], set()).add(row["caption"])
    assert all(len(texts) == 1 for texts in prompts.values())
    assert 1.6 < 2 * len(rows) / len(prompts) < 2.0


def test_captions_are_training_prompts(pair_folder: Path):
    captions = {row["caption"] for row in rows_of(pair_folder)} - {""}
    assert captions <= set(scenes.prompts("train"))


def test_ensure_pairs_writes_once(tmp_path: Path):
    ensure_pairs(tmp_path, 40)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    ensure_pairs(tmp_path, 40)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert sum(name.startswith("train-") for name in before) == 4
    assert sum(name.startswith("validation-") for name in before) == 1


def test_ensure_pairs_redraws_a_set_of_another_size(tmp_path: Path):
    ensure_pairs(tmp_path, 40)
    ensure_pairs(tmp_path, 60)
    rows = [pq.read_metadata(path).num_rows for path in sorted(tmp_path.glob("train-*"))]
    assert rows == [15, 15, 15, 15]


def test_more_files_than_pairs_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="shards=5 must lie between 1 and num_pairs=4"):
        write_pairs(tmp_path, 4, seed=0, shards=5)
