"""`make smoke` in earnest: two steps of everything, through the Makefile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file

from tests.helpers_ranks import environment

ROOT = Path(__file__).parent.parent
TOGETHER = "tuning=lora latents=model zero=stage3"


@pytest.mark.slow
def test_make_smoke_leaves_one_of_everything(tmp_path: Path):
    """The quickest form, with an adapter, cached latents and shared-out parameters at once."""
    (tmp_path / "env").mkdir()
    (tmp_path / "env/.ready").touch()  # the environment is there
    pairs = f"pairs.root={tmp_path}/pairs pairs.options.num_pairs=160"
    command = [
        "make", "smoke", f"VENV={tmp_path}/env", f"PY={sys.executable}", "NPROC=1", "RUN=tried",
        f"ARGS=runs={tmp_path} {pairs} evaluate.prompts.max_prompts=4 {TOGETHER}",
    ]  # fmt: skip
    clean = {
        name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"
    }
    done = subprocess.run(
        command, cwd=ROOT, env=clean | environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "tried"
    lines = [json.loads(line) for line in (run / "train/journal.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["validation_accuracy"] is not None for line in lines)
    assert lines[1]["reference_version"] == 1
    assert len(list((run / "train/samples").iterdir())) == 3  # of the base, and after each step
    assert load_file(run / "train/lora/pytorch_lora_weights.safetensors")
    assert (run / "train/pipeline/model_index.json").is_file()
    assert "images: latents in" in done.stdout
    rates = pl.read_parquet(run / "evaluate/winrates.parquet")
    assert (rates["prompts"] == 4).all()
    assert (run / "evaluate/report.html").is_file()
