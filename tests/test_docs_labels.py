"""What docs/labels.md says works: its recipes and commands are taken from the page and run."""

import re
from pathlib import Path

import polars as pl
import pytest

from data.artifacts.schemas import labels
from label.config import Rule, TieRule
from tests.helpers_label import nursery
from tests.test_conf import job

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "labels.md").read_text()
RECIPES = re.findall(r"\*\*(\d+)\. ([^*]+)\*\*.*?```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the label sets that the page speaks of, of fewer pairs."""
    folder = tmp_path_factory.mktemp("docs")
    people_twice = ["vote.name=people_twice", "vote.human_votes=true", "vote.weights.human=2"]
    for vote in (["vote=majority"], ["vote=unanimous"], people_twice):
        status, output = nursery().run(
            ["run=miniature", *vote, f"runs={folder}/runs",
             f"pairs.root={folder}/data/miniature/pairs/3000", "pairs.options.num_pairs=200",
             "label.workers=0", "label.device=cpu"],
            folder / "out.txt",
        )  # fmt: skip
        assert status == 0, output
    return folder


@pytest.mark.slow
def test_recipes_run_one_after_the_other(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [int(number) for number, _, _ in RECIPES] == list(range(1, len(RECIPES) + 1))
    assert len(RECIPES) >= 10
    monkeypatch.chdir(world)
    known: dict[str, object] = {}
    for _, title, code in RECIPES:
        exec(compile(code, title, "exec"), known)
        assert capsys.readouterr().out.strip(), title
    labels = pl.read_parquet(world / "runs/miniature/labels/majority/part-*.parquet")
    assert known["labels"].collect().equals(labels)
    assert known["judged"].collect().height > 100
    assert 0 < known["ties"].collect().height < 100
    assert known["bad"].collect().height == labels.filter(pl.col("status") != "ok").height > 0
    assert known["both"].collect().height == labels.height
    assert (world / "image_0.jpg").read_bytes()[:2] == b"\xff\xd8"
    # recipes against what the program makes of the same
    voted = pl.read_parquet(world / "runs/miniature/labels/people_twice/part-*.parquet")
    scored = voted.filter(pl.col("status") == "ok")
    assert known["tried"].collect()["tried"].cast(pl.Int8).equals(scored["winner"], null_equal=True)
    assert not scored["winner"].equals(known["tried"].collect()["winner"])
    flips = labels.filter(pl.col("winner") == pl.col("human")).height
    assert known["judged"].select(known["flipped"].sum()).collect().item() == flips


def test_the_page_names_every_rule_and_every_column() -> None:
    for word in (*Rule, *TieRule):
        assert f"`{word.value}`" in PAGE
    for name in labels(["m"]).names:
        assert f"`{name}`" in PAGE, name
    for path in (ROOT / "conf" / "vote").glob("*.yaml"):
        vote = job(f"vote={path.stem}").vote
        assert f"`{vote.rule.value}`" in PAGE
