"""`python -m label.parity`: the benchmarks' formulas by hand, and the command on a small run."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from conf.job import Job
from data.artifacts.atomic import sha256_of
from label.config import MetricSpec, ParitySpec
from label.parity.__main__ import main, measured
from label.parity.accuracy import cross_fitted, measure, strict, with_ties, without_inversions
from label.parity.references import REFERENCES, Reference, ReferenceImage, check
from label.run import main as label
from tests import helpers_label as tiny
from tests.test_conf import job as composed

HUMAN = np.array([1.0, 0.0, 1.0, 0.5, 0.0, 1.0])
GAP = np.array([2.0, -1.0, 0.0, 3.0, 1.0, -0.5])
PROMPTS = pl.Series(["a", "a", "a", "a", "b", "c"])


# --- formulas ------------------------------------------------------------------------------------


def test_imagerewards_accuracy_by_hand() -> None:
    assert strict(HUMAN, GAP) == 2 / 5  # right, right, equal is wrong, (tied), wrong, wrong


def test_hpdv2s_accuracy_by_hand() -> None:
    a, b, c = (1 + 1 + 1) / 3, 0.0, 0.0  # equal is right; over prompts
    assert without_inversions(HUMAN, GAP, PROMPTS) == pytest.approx((a + b + c) / 3)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, (1 + 1 + 0.5 + 0.5 + 0 + 0) / 6),  # the third is called a tie, the fourth is one
        (0.5, (1 + 1 + 0.5 + 0.5 + 0 + 0.5) / 6),
        (1.0, (0.5 + 0.5 + 0.5 + 1 + 0.5 + 0.5) / 6),
    ],
)
def test_pickapics_accuracy_by_hand(threshold: float, expected: float) -> None:
    chance = np.array([0.9, -0.8, 0.0, 0.95, 0.7, -0.3])
    assert with_ties(HUMAN, chance, threshold) == pytest.approx(expected)


def test_the_threshold_comes_from_the_other_half() -> None:
    human = np.array([0.5, 0.5, 1.0, 1.0])
    chance = np.array([0.35, 0.35, 0.45, 0.25])
    half = np.array([0, 0, 1, 1])
    # The ties' half likes 0.4 best, the other half 0 (each the first of the best).
    assert with_ties(human[:2], chance[:2], 0.4) == 1
    expected = (2 * 0.5 + with_ties(human[2:], chance[2:], 0.4) * 2) / 4
    assert cross_fitted(human, chance, half) == pytest.approx(expected) == 0.625


def test_pairs_without_scores_or_labels_do_not_count() -> None:
    judged = pl.DataFrame(
        {
            "pair_id": ["p", "q", "r", "s"],
            "prompt": ["x"] * 4,
            "human": [1.0, None, 0.0, 0.5],
            "score_0": [3.0, 1.0, None, 2.0],
            "score_1": [1.0, 2.0, 1.0, 2.0],
        },
        schema_overrides={"human": pl.Float32, "score_0": pl.Float32, "score_1": pl.Float32},
    )
    result = measure("m", judged, scale=1.0, threshold=0.0)
    assert (result.pairs, result.ties, result.strict, result.thresholded) == (2, 1, 1.0, 1.0)
    nothing = measure("m", judged.head(0), scale=1.0, threshold=None)
    assert nothing.pairs == 0
    assert math.isnan(nothing.strict)
    assert math.isnan(nothing.thresholded)


def test_the_chance_of_a_pair_is_a_softmax() -> None:
    judged = pl.DataFrame(
        {"pair_id": ["p"], "prompt": ["x"], "human": [0.5], "score_0": [0.30], "score_1": [0.29]}
    )
    apart = 1 / (1 + math.exp(-1.0)) - 1 / (1 + math.exp(1.0))  # 100 x 0.01
    for threshold, expected in ((apart + 1e-6, 1.0), (apart - 1e-6, 0.5)):
        assert measure("m", judged, 100.0, threshold).thresholded == expected


# --- published scores ----------------------------------------------------------------------------


def reference(path: Path, **more: object) -> Reference:
    image = ReferenceImage(path.name, sha256_of(path))
    given = {"images": (image,), "prompts": ("a", "b"), "expected": (1.0, 2.0)} | more
    return Reference("somewhere", "clip", "tiny", tolerance=0.1, **given)


@pytest.mark.parametrize(
    ("scores", "scale", "expected", "fits"),
    [
        ((1.05, 1.95), 0.0, (1.0, 2.0), True),
        ((1.05, 2.2), 0.0, (1.0, 2.0), False),
        ((math.nan, 2.0), 0.0, (1.0, 2.0), False),
        ((0.0, 0.01), 100.0, (1 / (1 + math.e), math.e / (1 + math.e)), True),
    ],
)
def test_scores_are_compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: tuple[float, ...],
    scale: float,
    expected: tuple[float, ...],
    fits: bool,
) -> None:
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "one.png"
    path.write_bytes(tiny.image(1))
    own = reference(path, scale=scale, expected=expected)
    monkeypatch.setattr("label.parity.references.REFERENCES", (own,))
    requests = []

    def score(name: str, images: list[bytes], prompts: tuple[str, ...]) -> np.ndarray:
        requests.append((name, len(images), prompts))
        return np.array(scores, np.float32)

    metrics = {
        "mine": MetricSpec(kind="clip", weights="folder/tiny-clip"),
        "other": MetricSpec(kind="clip", weights="folder/large"),
        "hps": MetricSpec(kind="hps", weights="tiny"),
    }
    (finding,) = check(metrics, tmp_path, score)
    assert requests == [("mine", 2, ("a", "b"))]
    assert finding.metric == "mine"
    assert finding.fits is fits


def test_missing_and_wrong_images_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(tiny.image(1))
    monkeypatch.setattr("label.parity.references.REFERENCES", (reference(path),))
    metrics = {"mine": MetricSpec(kind="clip", weights="tiny")}
    (tmp_path / "empty").mkdir()
    for folder, says in (
        (None, "parity.images is not set"),
        (tmp_path / "empty", "no one.png below"),
        (tmp_path, "one.png is another image"),
    ):
        if folder == tmp_path:
            path.write_bytes(tiny.image(2))
        (finding,) = check(metrics, folder, lambda *_: np.zeros(2))
        assert says in finding.missing
        assert not finding.fits


def test_published_references_are_of_metrics_that_exist() -> None:
    metrics = {
        name: composed(f"+metric@metrics.mine={name}").metrics["mine"]
        for name in ("image_reward", "hps_v2", "hps_v21", "clip_b", "clip_l")
    }
    about = {
        own.source: [name for name, spec in metrics.items() if own.is_about(spec)]
        for own in REFERENCES
    }
    assert list(about.values()) == [["image_reward"], ["hps_v2"], ["clip_b"]]
    for own in REFERENCES:
        assert len(own.prompts) == len(own.expected)
        assert len(own.prompts) % len(own.images) == 0
        assert all(len(image.sha256) == 64 for image in own.images)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose pairs are scored."""
    root = tmp_path_factory.mktemp("parity")
    weights, pairs = tiny.build_weights(root / "weights"), tiny.build_pairs(root / "pairs")
    built = composed(*tiny.overrides(weights, pairs, root / "runs"))
    label(built)
    return built


def test_accuracy_of_a_run_is_that_of_its_files(job: Job) -> None:
    results = {accuracy.metric: accuracy for accuracy in measured(job)}
    assert list(results) == ["hps", "clip", "pickscore", "aesthetic"]
    folder = job.folder / "scores"
    human = pl.read_parquet(folder / "pairs" / "part-*.parquet")["human"].to_list()
    for name, accuracy in results.items():
        scores = pl.read_parquet(folder / name / "part-*.parquet")
        rows = zip(human, scores["score_0"], scores["score_1"], strict=True)
        good = [row for row in rows if None not in row]
        decided = [(h, a, b) for h, a, b in good if h != 0.5]
        right = sum((a > b) == (h == 1) and a != b for h, a, b in decided)
        assert accuracy.pairs == len(good) > 30
        assert accuracy.ties == len(good) - len(decided) > 0
        assert accuracy.strict == pytest.approx(right / len(decided))
        assert 0 < accuracy.thresholded < 1


def test_a_table_and_exit_status_0(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    main(job)
    said = capsys.readouterr().out
    assert "none is about the metrics of this job" in said
    assert "Pick-a-Pic's *" in said
    assert all(name in said for name in ("hps", "clip", "pickscore", "aesthetic"))


@pytest.mark.parametrize("expected", [None, 5.0])
def test_a_mismatch_is_exit_status_1(
    job: Job,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    expected: float | None,
) -> None:
    (tmp_path / "one.png").write_bytes(tiny.image(1, (64, 48), "PNG"))
    own = reference(tmp_path / "one.png", prompts=("a red circle",), expected=(expected or 0.0,))
    own = Reference(own.source, own.kind, "", own.images, own.prompts, own.expected, 1.0)
    monkeypatch.setattr("label.parity.references.REFERENCES", (own,))
    monkeypatch.setattr(job, "parity", ParitySpec(images=str(tmp_path)))
    if expected is None:  # any cosine is within 1 of 0
        main(job)
        assert "equal        clip: somewhere" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="1"):
            main(job)
        assert "DIFFERENT    clip: somewhere" in capsys.readouterr().out


def test_nothing_at_hand_is_exit_status_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "label.parity", f"runs={tmp_path}", "panel=extended",
         f"parity.images={tmp_path}"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "not checked  image_reward: README of THUDM/ImageReward" in done.stdout
    assert "no 1.webp below" in done.stdout
    assert "run `make labels`" in done.stdout


def test_settings_that_make_no_sense(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"parity\.threshold=2\.0; it must be in \[0, 1\], or null"
    ):
        ParitySpec(threshold=2.0)
    monkeypatch.setattr(job, "parity", ParitySpec(images="/no/such/folder"))
    with pytest.raises(ValueError, match=r"parity\.images=/no/such/folder: no such folder"):
        main(job)
