"""The scripts of examples/ run one after the other, as a reader would start them, but smaller."""

import csv
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data.images import encode_png
from tests.helpers_ranks import ROOT, run_ranks

CHEAP = ["label.workers=0", "label.device=cpu"]

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


def script(name: str, arguments: list[str]) -> None:
    os.chdir(ROOT)
    sys.argv = [name, *arguments]
    runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all three have run."""
    run = tmp_path_factory.mktemp("examples") / "small"
    judge = ["--prompts=4", "evaluate.steps=2", "evaluate.resamples=200", "evaluate.device=cpu"]
    for name, arguments in (
        ("label_pairs", CHEAP),
        ("train_on_labels", ["--steps=2", "train.device=cpu"]),
        ("judge_models", judge),
    ):
        run_ranks(run / f"log-{name}", 1, script, name, [f"--run={run}", *arguments])
    return run


def said(run: Path, name: str) -> str:
    return (run / f"log-{name}" / "rank0.log").read_text()


def test_labels_are_those_of_the_table(run: Path):
    labels = pl.read_parquet(run / "labels/majority/part-*.parquet")
    with (run / "input" / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert labels["prompt"].to_list() == [row["prompt"] for row in rows]
    assert labels["image_0"].to_list() == [row["image_0"] for row in rows]
    assert (labels["status"] == "ok").all()
    assert "majority" in said(run, "label_pairs")


def test_training_begins_at_ln_2_and_leaves_an_image(run: Path):
    assert "0.693147" in said(run, "train_on_labels")
    assert (run / "image.png").read_bytes()[1:4] == b"PNG"


def test_win_rates_are_printed_as_they_are_stored(run: Path):
    rates = pl.read_parquet(run / "evaluate/winrates.parquet")
    assert set(rates["model"]) == {"candidate"}
    assert (rates["prompts"] == 4).all()
    for metric in rates["metric"]:
        assert metric in said(run, "judge_models")


def test_people_and_json_lines(tmp_path: Path):
    """A table with a human choice, as JSON Lines; its labels are what people said."""
    rows = [
        {"prompt": "a red circle", "image_0": "a.png", "image_1": "b.png", "human": human}
        for human in (1.0, 0.0, 0.5)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shots").mkdir()
    for name, value in (("a.png", 0), ("b.png", 255)):
        pixels = np.full((64, 64, 3), value, np.uint8)
        (tmp_path / "shots" / name).write_bytes(encode_png(pixels))
    words = [
        f"--run={tmp_path}/run",
        f"--table={tmp_path}/pairs.jsonl",
        f"--images={tmp_path}/shots",
    ]
    run_ranks(tmp_path / "log", 1, script, "label_pairs",
              [*words, "vote=human", "panel.voters=[clip]", *CHEAP])  # fmt: skip
    labels = pl.read_parquet(tmp_path / "run/labels/human/part-*.parquet")
    assert labels["winner"].to_list() == [0, 1, None]
    assert labels["human"].to_list() == [1.0, 0.0, 0.5]
