"""`make bench-label`: what it measures is asked of a machine; that it runs is asked here."""

import json
from pathlib import Path

import pytest

from benchmarks.inputs import SLOTS, repetition
from tests.helpers_ranks import run_module

PARTS = ("model_dominates", "embeddings_an_image", "changed_votes")


def test_pairs_repeat_as_pick_a_pics_do() -> None:
    rows = list(repetition(50_000))
    slots = 2 * len(rows) / len({image for _, *pair in rows for image in pair})
    assert slots == pytest.approx(SLOTS, abs=0.02)
    assert len(rows) / len({prompt for prompt, *_ in rows}) == pytest.approx(16, abs=0.5)
    assert all(left != right for _, left, right in rows)


@pytest.mark.ranks
@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_one_json_object(tmp_path: Path) -> None:
    done = run_module(tmp_path, "benchmarks.label", "--quick", "--only", *PARTS)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert [name for name in PARTS if name in figures] == list(PARTS)
    assert any(line.split()[:1] == ["per_pair_ratio"] for line in lines)
    speed = figures["model_dominates"]
    assert 0 < speed["floor_ratio"] < 1
    assert 0 < speed["floor_ratio_cpu"] < 1
    assert speed["predicted_decode"] == pytest.approx(4 * speed["slots_per_image"])
    assert set(speed["seconds"]) == {"all", "read", "decode", "embed", "latents", "score", "write"}
    assert sum(speed["seconds"].values()) < 2.02 * speed["seconds"]["all"]
    assert figures["embeddings_an_image"]["always"] == 1
    assert all(0 <= fraction <= 0.2 for fraction in figures["changed_votes"]["fp16"].values())
