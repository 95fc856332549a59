"""`pairs=folders`: what is a prompt, which images are a pair, and what is refused by name."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError
from tests.helpers_pairs import rows_of, write_images
from tests.helpers_train import image


def make(root: Path, *names: str, **texts: str) -> PairsSpec:
    """A set with these images, and the texts of `<name>.txt`, where __ stands for a slash."""
    write_images(root, list(names))
    for name, text in texts.items():
        path = root / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return PairsSpec(kind="folders", root=str(root), split="")


def pairs_of(spec: PairsSpec) -> set[tuple[str, frozenset[str]]]:
    return {
        (row["prompt"], frozenset((row["uid_0"], row["uid_1"])))
        for row in rows_of(open_pairs(spec))
    }


def both(prompt: str, *names: str) -> tuple[str, frozenset[str]]:
    return prompt, frozenset(names)


def test_a_folder_a_prompt_gives_all_pairs_of_its_images(tmp_path: Path):
    spec = make(tmp_path, "a cat/1.png", "a cat/2.png", "a cat/10.png", "deep/a dog/x.JPG",
                "deep/a dog/y.webp", notes="not about any image")  # fmt: skip
    assert pairs_of(spec) == {
        both("a cat", "a cat/1.png", "a cat/2.png"),
        both("a cat", "a cat/1.png", "a cat/10.png"),
        both("a cat", "a cat/2.png", "a cat/10.png"),
        both("a dog", "deep/a dog/x.JPG", "deep/a dog/y.webp"),
    }
    rows = rows_of(open_pairs(spec))
    assert all(row["human"] is None for row in rows)
    contents = {row[f"uid_{side}"]: row[f"image_{side}"] for row in rows for side in (0, 1)}
    assert contents["a cat/2.png"] == image(1)


@pytest.mark.parametrize("name", ["prompt", "caption"])
def test_a_text_in_the_folder_goes_before_its_name(name: str, tmp_path: Path):
    texts = {f"0__{name}": "\ufeffa cat,\r\nsitting\n", f"1__{name}": "  "}
    spec = make(tmp_path, "0/a.png", "0/b.png", "1/a.png", "1/b.png", **texts)
    assert pairs_of(spec) == {
        both("a cat,\nsitting", "0/a.png", "0/b.png"),
        (None, frozenset(("1/a.png", "1/b.png"))),  # a row with the status empty_prompt
    }


def test_the_case_of_a_texts_name_does_not_count(tmp_path: Path):
    write_images(tmp_path, ["0/a.png", "0/b.png", "7_0.png", "7_1.png"])
    (tmp_path / "0" / "PROMPT.TXT").write_text("a cat")
    (tmp_path / "7.TXT").write_text("seven")
    spec = PairsSpec(kind="folders", root=str(tmp_path), split="")
    expected = {both("a cat", "0/a.png", "0/b.png"), both("seven", "7_0.png", "7_1.png")}
    assert pairs_of(spec) == expected
    (tmp_path / "7.txt").write_text("another")
    with pytest.raises(PairsError, match=r"several texts of one name \(7\.TXT, 7\.txt\); keep one"):
        open_pairs(spec)


def test_numbered_images_beside_their_texts(tmp_path: Path):
    spec = make(
        tmp_path, "7_0.png", "7_1.jpg", "x/a_1_0.png", "x/a_1_2.png", "x/b_w.png", "x/b_l.png",
        **{"7": "seven", "x__a_1": "one", "x__b": "two"},
    )  # fmt: skip
    assert pairs_of(spec) == {
        both("seven", "7_0.png", "7_1.jpg"),
        both("one", "x/a_1_0.png", "x/a_1_2.png"),
        both("two", "x/b_w.png", "x/b_l.png"),
    }


def test_people_chose_between_a_winner_and_a_loser_alone(tmp_path: Path):
    spec = make(tmp_path, "p/a_w.png", "p/b_W.png", "p/c_l.png", "p/d_l.png")
    for row in rows_of(open_pairs(spec)):
        marks = row["uid_0"][-5].lower(), row["uid_1"][-5].lower()
        assert row["human"] == {"wl": 1.0, "lw": 0.0}.get("".join(marks))


def test_sides_are_drawn_and_belong_to_the_settings(tmp_path: Path):
    names = [f"{i}_{k}_{mark}.png" for i in range(40) for k, mark in enumerate("wl")]
    spec = make(tmp_path, *names, **{str(i): f"number {i}" for i in range(40)})
    human = [row["human"] for row in rows_of(open_pairs(spec))]
    assert 8 < sum(human) < 32  # the winner's name comes first, its image does not
    assert human == [row["human"] for row in rows_of(open_pairs(spec))]
    other = open_pairs(replace(spec, side_seed=1))
    assert [row["human"] for row in rows_of(other)] != human
    assert other.shards[0].reading != open_pairs(spec).shards[0].reading


def test_another_file_or_text_is_another_set(tmp_path: Path):
    spec = make(tmp_path, "a_0.png", "a_1.png", a="a cat")
    first = open_pairs(spec)
    assert first.shards == open_pairs(spec).shards
    assert first.fingerprint(first.shards[0])["sha256"] in first.shards[0].reading
    (tmp_path / "a.txt").write_text("a dog")
    second = open_pairs(spec)
    write_images(tmp_path, ["a_2.png"])
    readings = {source.shards[0].reading for source in (first, second, open_pairs(spec))}
    assert len(readings) == 3


def test_splits_are_folders(tmp_path: Path):
    spec = make(tmp_path, "train/train station/0.png", "train/train station/1.png",
                "validation/a cat/0.png", "validation/a cat/1.png")  # fmt: skip
    with pytest.raises(PairsError, match=r"of the splits train, validation; choose one, as "):
        open_pairs(spec)
    for split, prompts in (
        ("train", {"train station"}), ("validation", {"a cat"}), ("all", {"train station", "a cat"})
    ):  # fmt: skip
        assert {prompt for prompt, _ in pairs_of(replace(spec, split=split))} == prompts
    with pytest.raises(PairsError, match=r"no folder 'test' for pairs.split=test; it has tr"):
        open_pairs(replace(spec, split="test"))


def test_max_pairs_takes_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.pairs.folders.SHARD_ROWS", 2)
    spec = make(tmp_path, *[f"a cat/{i}.png" for i in range(4)])
    assert [shard.rows for shard in open_pairs(spec).shards] == [2, 2, 2]
    source = open_pairs(replace(spec, max_pairs=3))
    assert [(shard.rows, shard.first) for shard in source.shards] == [(2, 0), (2, 2)]
    assert len(rows_of(source)) == 4


@pytest.mark.parametrize(
    ("names", "texts", "says"),
    [
        ([], {}, "has no images (.png, "),
        ([], {"a": "a cat"}, "has no images"),
        (["a.png", "b.png"], {}, "has images but no text; put each prompt's images into a folder"),
        (["train/a.png", "train/b.png"], {}, "train has images but no text"),
        (["a cat/0.png"], {}, "a cat has one image, a cat/0.png, and a pair needs two; add an"),
        (["a/0.png", "b/0.png"], {}, "a pair needs two, as 1 more prompts have too few"),
        (["a_0.png", "a_1.png"], {"a": "x", "b": "y"}, "b.txt has no image and a pair needs two"),
        (["a/0.png", "a/1.png"], {"b__prompt": "y", "a__prompt": "x"}, "b/prompt.txt has no image"),
        (["a_0.png", "a_1.png", "b_0.png", "b_1.png"], {"a": "x"}, "b_0.png (and 1 more) has no t"),
        (["a_0.png", "a.png"], {"a": "x"}, "a.png has no text"),
        (["a/0.png", "a/1.png", "b/0.png", "b/1.png"], {"a__prompt": "x"},
         "b has no prompt.txt or caption.txt, but"),
        (["a/0.png", "a/1.png"], {"a__prompt": "x", "a__caption": "y"},
         "a has caption.txt and prompt.txt; keep one text a folder"),
        (["a/0_w.png", "a/1.png"], {}, "winners end in _w and losers in _l, but a/1.png has neith"),
        (["a/0_w.png", "a/1_w.png"], {}, "but all images end in _w; mark every image"),
        (["a/0_w_l.png", "a/1_l.png"], {}, "a/0_w_l.png is marked twice"),
        (["a/0.png", "a/0.jpg"], {}, "several images of one name"),
        (["b\udce9/0.png", "b\udce9/1.png"], {}, r"b\udce9/0.png', whose name is not UTF-8"),
        (["a_0.png", "a_1.png"], {"a": '{"prompt": "a cat"}'}, "a.txt holds JSON"),
        (["a_0.png", "a_1.png"], {"a": "<html>"}, "a.txt is a web page, not a prompt"),
        (["a_0.png", "a_1.png"], {"a": "a\0"}, "a.txt, line 1 has a NUL byte"),
    ],
)  # fmt: skip
def test_what_makes_no_pair_is_refused_by_name(
    names: list[str], texts: dict[str, str], says: str, tmp_path: Path
):
    with pytest.raises(PairsError, match=re.escape(says)) as caught:
        open_pairs(make(tmp_path, *names, **texts))
    assert str(tmp_path) in str(caught.value)


def test_images_lie_below_the_root(tmp_path: Path):
    spec = make(tmp_path, "a/0.png", "a/1.png")
    with pytest.raises(PairsError, match=r"leave pairs\.image_root out"):
        open_pairs(replace(spec, image_root="/elsewhere"))
