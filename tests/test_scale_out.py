"""The commands of docs/scale-out.md, as far as one machine can run them."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import helpers_label as tiny
from tests.helpers_ranks import launcher_environment

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "scale-out.md").read_text()

SRUN = """#!/bin/bash
# srun as it starts two tasks on one machine
[ "$1" = --kill-on-bad-exit=0 ] && shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=$task SLURM_STEP_NODELIST=node1 "$@" &
done
wait -n && wait -n
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("world")
    weights, pairs = tiny.build_weights(root / "weights"), tiny.build_pairs(root / "pairs")
    return tiny.overrides(weights, pairs, root / "runs")


def block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    assert match
    return match[1]


def run(command: list[str], path: str = "") -> Path:
    """Run a command of the guide on the tiny world; the run's folder."""
    environment = os.environ | launcher_environment()
    environment["PATH"] = f"{path}:{environment['PATH']}" if path else environment["PATH"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "total 44" in done.stdout
    settings = dict(item.split("=", 1) for item in command if "=" in item)
    return Path(settings["runs"]) / settings["run"]


@pytest.mark.slow
@pytest.mark.ranks
def test_torchrun_and_srun_make_the_same_files(arguments: list[str], tmp_path: Path) -> None:
    sh, bash = block("sh"), block("bash")
    torchrun = [*shlex.split(sh), *arguments, "run=torchrun"]
    script, srun = tmp_path / "labels.sh", tmp_path / "srun"
    script.write_text(bash)
    srun.write_text(SRUN)
    srun.chmod(0o755)
    slurm = ["bash", str(script), *arguments, "run=slurm"]
    by_torchrun, by_srun = tiny.hashes(run(torchrun)), tiny.hashes(run(slurm, str(tmp_path)))
    assert by_torchrun == by_srun
    assert len(by_torchrun) == 3 * 6  # the pairs' facts, four metrics and the labels
