"""The benchmark of stage two runs, and its figures fit together."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers_ranks import ROOT, environment


@pytest.mark.ranks
@pytest.mark.slow
def test_the_benchmark_runs():
    options = ["--quick", "--stages", "2", "--options", "selective"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", *options],
        cwd=ROOT, env=os.environ | environment(), capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert any("latents ready" in line for line in table)
    quick = found["worlds"]["quick"]
    speed = quick["pairs_per_s"]
    assert set(speed) == {"ours", "ours, latents ready", "floor", "diffusers"}
    assert min(speed.values()) > 0
    assert found["pairs_per_s"] == speed["ours, latents ready"]
    ratio = speed["ours, latents ready"] / speed["floor"]  # one block: the median is it
    assert found["floor_ratio"] == pytest.approx(ratio)
    assert quick["gflops"] == pytest.approx(quick["gflop_a_pair"] * found["pairs_per_s"])
    assert set(found["worlds"]["quick_xl"]["pairs_per_s"]) == {"ours", "ours, latents ready"}
    assert found["options"]["train.gradient_checkpointing=selective"]["times_faster"] > 0
    memory = found["peak_memory_by_stage"]["2"]
    assert 0 < memory["own_mib"] < memory["peak_mib"]
