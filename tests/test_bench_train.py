"""The benchmark of stage two runs, and its figures fit together."""

import json
from pathlib import Path

import pytest

from tests.helpers_ranks import be_module, run_module, start_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_the_benchmark_runs(tmp_path: Path):
    options = ["--quick", "--stages", "", "--options", "selective"]
    done = run_module(tmp_path, "benchmarks.train", *options, forks=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *table, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert any("ratios with latents (and texts) ready" in line for line in table)
    quick = figures["worlds"]["quick"]
    speed = quick["pairs_per_s"]
    assert set(speed) == {"ours", "ours, latents ready", "floor", "diffusers"}
    assert min(speed.values()) > 0
    assert figures["pairs_per_s"] == speed["ours, latents ready"]
    ratio = speed["ours, latents ready"] / speed["floor"]  # one block: the median is it
    assert figures["floor_ratio"] == pytest.approx(ratio)
    assert quick["gflops"] == pytest.approx(quick["gflop_a_pair"] * figures["pairs_per_s"])
    assert set(figures["worlds"]["quick_xl"]["pairs_per_s"]) == {"ours", "ours, latents ready"}
    flow = figures["worlds"]["quick_flux"]
    speed = flow["pairs_per_s"]
    assert set(speed) == {"ours", "ours, latents ready", "ours, and texts", "floor"}
    assert flow["floor_ratio"] == pytest.approx(speed["ours, and texts"] / speed["floor"])
    without = speed["ours, latents ready"] / speed["ours, and texts"]
    assert flow["text_encoders_fraction"] == pytest.approx(1 - without)
    assert flow["diffusers_ratio"] is None
    assert figures["options"]["train.gradient_checkpointing=selective"]["times_faster"] > 0
    assert figures["peak_memory_by_stage"] == {}


def test_ranks_measure_their_memory(tmp_path: Path):
    """What `peak_by_stage` starts under torchrun, which test_known_defects runs in earnest."""
    from benchmarks import memory
    from benchmarks.worlds import WORLDS, write_world

    write_world(WORLDS["quick"], tmp_path / "world", pairs=16)
    arguments = memory.arguments("quick", tmp_path / "world", stage=2)
    ranks = start_ranks(tmp_path / "ranks", memory.RANKS, be_module, memory.__name__, arguments)
    assert ranks.wait() == 0, ranks.output
    peaks = memory.read_peaks((tmp_path / "ranks" / "rank0.log").read_text())
    assert 0 < peaks["own_mib"] < peaks["peak_mib"]
