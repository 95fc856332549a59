"""The benchmark of the vote runs, and its last line is JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.vote import METRICS, WORDS


@pytest.mark.slow
def test_last_line_has_every_figure():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vote", "--pairs=301", "--files=3", "--repeats=1"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    *table, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert (figures["pairs"], figures["files"], figures["metrics"]) == (301, 3, len(METRICS))
    for name, words in WORDS.items():
        assert figures[f"{name}_s"] >= figures[f"{name}_best_s"] > 0
        assert figures[f"{name}_cpu_s"] >= 0
        assert any(words[:20] in line for line in table)
    # a whole command does all that its parts do, and starts an interpreter
    assert figures["command_s"] > figures["total_s"]
