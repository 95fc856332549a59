"""What only a GPU can show; each test is skipped where there are too few."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.devices import choose_device
from data.distributed import Rank
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from label.metrics.registry import score_settings
from label.scoring.batching import AsyncCopy, Batch
from label.scoring.decode_pool import DecodePool
from label.scoring.panel import Panel
from label.scoring.score_sets import ScoreSets, plan
from label.scoring.scoring_pass import Clock
from label.scoring.shard_scorer import ScoringTools, score_shards
from tests import helpers_label as tiny
from tests import rank_programs
from tests.helpers_ranks import Place, make_place
from tests.helpers_train import SIDE
from train.config import ModelSpec, Precision
from train.dpo.objectives import dpo
from train.dpo.step import Models, draw_noise, step
from train.models.components import load_components
from train.trainer.tally import Tally

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    """Skip where there are fewer GPUs than the test's marker `gpu(n)` says."""
    marker = request.node.get_closest_marker("gpu")
    needed = marker.args[0] if marker and marker.args else 1
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPUs")


def scored_on(device: torch.device, folder: Path, pairs: Path) -> list[bytes]:
    """The files of scores that a device makes."""
    specs = {name: spec for name, spec in tiny.specs(pairs / "weights").items() if name != "oracle"}
    source = open_pairs(PairsSpec(root=str(pairs / "pairs")))
    sets = ScoreSets(folder, source.shards, score_settings(specs))
    with DecodePool(2) as decoder:
        tools = ScoringTools(
            source, Panel.load(specs, device), sets, decoder, Batch(8), Clock(), 2**20
        )
        score_shards(plan(sets, Rank()), tools)
    return [path.read_bytes() for path in sorted(folder.rglob("*.parquet"))]


@pytest.mark.gpu(2)
def test_scores_of_the_second_gpu_are_those_of_the_first(tmp_path: Path):
    tiny.build_weights(tmp_path / "weights")
    tiny.build_pairs(tmp_path / "pairs", num_files=2, per_file=70)
    first, second = (
        scored_on(choose_device("label.device", f"cuda:{index}", Rank()), tmp_path / name, tmp_path)
        for index, name in enumerate(("first", "second"))
    )
    assert first == second


@pytest.mark.gpu(2)
def test_a_copy_waits_for_a_device_that_is_not_current():
    """The current device is 0 and idle; the values are made by long work on 1."""
    torch.cuda.set_device(0)
    with torch.cuda.device(1):
        values = torch.ones(4096, 4096, device="cuda:1")
        for _ in range(20):
            values = (values @ values).clamp(0, 1)
    assert AsyncCopy(values).wait().min() == 1


def train(place: Place, run: str, *more: str, world: int = 1) -> str:
    """Train on GPUs, without the variables that keep the other tests' ranks on the CPU."""
    place.label(run)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    overrides = place.overrides(run, "train.device=cuda", *more)
    outcome = subprocess.run(
        [*command, f"--nproc-per-node={world}", "-m", "train", *overrides],
        capture_output=True, text=True, timeout=500, check=False,
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")  # before anything is built
    return make_place(tmp_path_factory.mktemp("gpu"))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_of_two_gpus_is_resumed_by_one(place: Place, stage: int):
    """The optimizer's step counters have to be on the GPU after DeepSpeed's universal load."""
    run = f"moved-{stage}"
    train(place, run, f"zero=stage{stage}", world=2)
    straight = place.journal(run)
    for part in ("pipeline", "step-0000006"):
        shutil.rmtree(place.folder(run) / part)
    assert "written by 2 processes, now 1" in train(place, run, f"zero=stage{stage}")
    for one, two in zip(straight, place.journal(run), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_margin_is_0_at_the_first_step(place: Place, precision: str):
    train(place, precision, f"train.precision={precision}")
    first = place.journal(precision)[0]
    assert first["margin"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_nothing_inside_a_micro_batch_waits_for_the_device(place: Place):
    """A second micro-batch, when all kernels are loaded; torch raises at each synchronisation."""
    device = choose_device("train.device", "cuda", Rank())
    model = ModelSpec(path=str(place.root / "base"), resolution=SIDE)
    components = load_components(model, Precision.fp32, device)
    models = Models(components, components.denoiser(), components.denoiser())
    rule = rank_programs.draw_rule_of(components)
    tally = Tally.empty(device)
    for mode in ("default", "error"):
        batch = draw_noise(rank_programs.pair_batch(), rule).on(device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            output = step(batch, models, dpo(5000.0))
            output.loss.backward()
            tally.add(output, 0.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert tally.pairs == 8
