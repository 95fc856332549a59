"""`make advise` computes the factor at any beta from the journal, and says what it rests on."""

import json
import math
import re
from pathlib import Path

import pytest

from train.dpo.auto_beta import mean_factor
from train.trainer.beta_advice import advise, points
from train.trainer.tally import quantiles

SETTINGS = {
    "train": {
        "objective": {"kind": "dpo"}, "beta": 5000.0, "auto_beta": {"start": 5000.0}, "warmup": 10,
        "reference": {"every": 25},
    }
}  # fmt: skip


def normal(mean: float, spread: float, step: int) -> list[float]:
    """64 ascending margins, a little different in each step."""
    shift = 0.2 * math.sin(step)
    places = [(i + 0.5) / 64 for i in range(64)]
    return [mean + spread * (math.log(p / (1 - p)) / 1.7 + shift) for p in places]


def write_journal(folder: Path, steps: int, mean: float, **change: object) -> Path:
    lines = [
        {
            "step": step, "loss": 0.6, "accuracy": 0.7, "pairs_per_s": 1.0, "data_wait_s": 0.0,
            "margin": mean, "margin_quantiles": quantiles(normal(mean, 3e-4, step)),
            "reference_version": step // 25,
        } | change
        for step in range(1, steps + 1)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("beta", [500.0, 5000.0, 20_000.0, 1e9])
@pytest.mark.parametrize("mean", [-1e-4, 0.0, 3e-4, 1e-3])
def test_eleven_quantiles_are_enough(beta: float, mean: float):
    margins = normal(mean, 3e-4, 1)
    from_quantiles = mean_factor(points(quantiles(margins)), beta)
    assert from_quantiles == pytest.approx(mean_factor(margins, beta), abs=0.02)


def test_the_suggested_beta_has_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    advise(write_journal(tmp_path / "train", 60, 3e-4), SETTINGS, 0.4)
    said = capsys.readouterr().out
    assert "5000 (this run)" in said
    assert "steps 26 to 50" in said  # the steps after the 50th are not looked at
    best, low, high = map(
        float, re.search(r"train\.beta=([\d.e+]+) \(from ([\d.e+]+) to ([\d.e+]+)", said).groups()
    )
    assert low < best < high
    factors = [mean_factor(normal(3e-4, 3e-4, step), best) for step in range(26, 51)]
    assert sum(factors) / len(factors) == pytest.approx(0.4, abs=0.01)
    assert "the reference is renewed every 25 steps" in said
    assert "warm-up" not in said


def test_a_target_out_of_reach_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    advise(write_journal(tmp_path / "train", 12, 1e-6, accuracy=0.5), SETTINGS, 0.4)
    said = capsys.readouterr().out
    assert "No beta has a factor of 0.4" in said
    assert "the warm-up takes 10 steps" in said


@pytest.mark.parametrize(
    ("steps", "change", "settings", "message"),
    [
        (20, {}, None, "has no run; `make train` begins one"),
        (9, {}, SETTINGS, "has 9 lines of the first 50 steps; at least 10"),
        (20, {"margin_quantiles": None}, SETTINGS, "has no margin_quantiles: an earlier version"),
        (20, {}, {"train": {"objective": {"kind": "ipo"}}}, r"kind=ipo has no gradient factor"),
    ],
)
def test_what_it_needs_is_said(
    tmp_path: Path, steps: int, change: dict, settings: dict | None, message: str
):
    folder = write_journal(tmp_path / "train", steps, 3e-4, **change)
    with pytest.raises(ValueError, match=message):
        advise(folder, settings, 0.4)
