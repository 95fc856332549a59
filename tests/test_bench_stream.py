"""The benchmark of the stream runs, and its last line is what it says."""

import json
import sys

import pytest

from benchmarks import stream as bench


@pytest.mark.slow
def test_the_last_line_has_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["stream", "--quick"])
    bench.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["pairs_per_s"]) == {"images", "decoding alone", "latents", "reading alone"}
    assert all(speed > 0 for speed in figures["pairs_per_s"].values())
    assert figures["latents_ratio"] > 1
    assert 100 < figures["kb_an_image"] < 300
    for row in figures["memory"]:
        assert 0 < row["held_mib"] <= row["stated_mib"]
    assert set(figures["going_on_ms"]) == {"at_0%", "at_50%", "at_99%"}


def test_eight_ranks_read_each_row_group_about_twice_and_not_eight_times() -> None:
    assert bench.reading_of_ranks(1) == 1
    assert bench.reading_of_ranks(8) < 2.5
