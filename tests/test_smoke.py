"""`make smoke` in earnest: two steps of everything, by the commands of the Makefile."""

import json
import shlex
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file

from tests.helpers_docs import started
from tests.helpers_ranks import run_module

STAGES = ("label", "train", "evaluate")
TOGETHER = "tuning=lora latents=model zero=stage3"


@pytest.mark.ranks
@pytest.mark.slow
def test_make_smoke_leaves_one_of_everything(tmp_path: Path):
    """The quickest form, with an adapter, cached latents and sharded parameters at once."""
    pairs = f"pairs.root={tmp_path}/pairs pairs.options.num_pairs=160"
    settings = f"runs={tmp_path} {pairs} evaluate.prompts.max_prompts=4 {TOGETHER}"
    make = ["make", "smoke", "NPROC=1", "RUN=tried", f"ARGS={settings}"]
    commands = [words for words in started(shlex.join(make)) if words[0] in STAGES]
    assert [module for module, *_ in commands] == list(STAGES)
    output = ""
    for module, *arguments in commands:
        done = run_module(tmp_path / "logs" / module, module, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        output += done.stdout
    run = tmp_path / "tried"
    lines = [json.loads(line) for line in (run / "train/journal.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["validation_accuracy"] is not None for line in lines)
    assert lines[1]["reference_version"] == 1
    assert len(list((run / "train/samples").iterdir())) == 3  # of the base, and after each step
    assert load_file(run / "train/lora/pytorch_lora_weights.safetensors")
    assert (run / "train/pipeline/model_index.json").is_file()
    assert "images: latents in" in output
    rates = pl.read_parquet(run / "evaluate/winrates.parquet")
    assert (rates["prompts"] == 4).all()
    assert (run / "evaluate/report.html").is_file()
