"""`make bench-pairs` runs, and its last line is what it says."""

import json
import sys

import pytest

from benchmarks import pairs as bench

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_the_last_line_has_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pairs", "--quick"])
    bench.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["images_per_s"]
    assert figures["images"] == 8
    assert figures["ratio"] == pytest.approx(figures["ours"] / figures["bare"])
    assert figures["ratio_lowest"] <= figures["ratio"] <= figures["ratio_highest"]
