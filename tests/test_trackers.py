"""Weights & Biases is optional, and gets what the metrics log gets."""

import importlib.machinery
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.pairs.config import PairsSpec
from tests.helpers_ranks import shared_place
from train.config import ModelSpec, TrainSpec
from train.identity import TrainRun
from train.trainer import trackers


class StubRun:
    """What wandb.init returns, as far as it is used."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def run(tmp_path: Path) -> TrainRun:
    return TrainRun(
        folder=tmp_path / "mine" / "train", labels=tmp_path, pairs=PairsSpec(root="x"),
        model=ModelSpec(path="x"), train=TrainSpec(wandb="project"), seed=0, settings={"seed": 0},
    )  # fmt: skip


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.begun = []  # type: ignore[attr-defined]

    def init(**kwargs: Any) -> StubRun:
        module.begun.append((kwargs, StubRun()))  # type: ignore[attr-defined]
        return module.begun[-1][1]

    module.init = init  # type: ignore[attr-defined]
    module.Image = lambda pixels: ("image", pixels.shape)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_the_board_gets_numbers_and_images(run: TrainRun, wandb: Any):
    trackers.check_trackers(run)
    tracker = trackers.WeightsAndBiases(run)
    tracker.log({"train/loss": 0.5}, 3)
    tracker.log_images("samples", np.zeros((4, 5, 3), np.uint8), 4)
    tracker.close(failed=True)
    (options, stub), *_ = wandb.begun
    assert options["project"] == "project"
    assert options["name"] == "mine"
    assert options["config"] == {"seed": 0}
    assert options["resume"] == "allow"
    assert stub.metrics == [("*", "step")]
    assert stub.logged == [
        {"train/loss": 0.5, "step": 3},
        {"samples": ("image", (4, 5, 3)), "step": 4},
    ]
    assert stub.exit_code == 1


def test_the_same_folder_resumes_the_same_run(run: TrainRun, wandb: Any, tmp_path: Path):
    trackers.WeightsAndBiases(run)
    trackers.WeightsAndBiases(run)
    trackers.WeightsAndBiases(replace(run, folder=tmp_path / "other" / "train"))
    ids = [options["id"] for options, _ in wandb.begun]
    assert ids[0] == ids[1] != ids[2]


def test_without_the_package_it_says_so_before_a_weight_is_loaded(
    run: TrainRun, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="train.wandb=project needs the package wandb"):
        trackers.check_trackers(run)
    trackers.check_trackers(replace(run, train=TrainSpec()))  # not asked for, not missed


def test_nothing_is_sent_by_default(run: TrainRun, wandb: Any):
    opened = trackers.open_trackers(replace(run, train=TrainSpec()), 0)
    assert [type(tracker) for tracker in opened] == [trackers.TensorBoard]
    for tracker in opened:
        tracker.close(failed=False)
    assert not wandb.begun


@pytest.mark.ranks
@pytest.mark.skipif(trackers.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_run_without_the_package_ends_with_one_message():
    output = shared_place().fail("unsent", "train.wandb=project")
    assert "needs the package wandb, which is not installed" in output
    assert "Traceback" not in output
