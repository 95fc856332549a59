"""docs/metrics.md, "Adding a metric", done as it says: a package and a YAML outside of ours."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.artifacts.manifest import read_manifest
from label.config import MetricSpec
from label.metrics.registry import built_in_kinds, definition_of, resolve, score_settings
from tests.helpers_docs import ROOT, blocks, shell_lines, started

PAGE = ROOT / "docs" / "metrics.md"
OPTIONS = {"shift_weight": 0.3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page tells to write, under the names it gives."""
    folder = tmp_path_factory.mktemp("place")
    section = PAGE.read_text().partition("## Adding a metric")[2]
    names = re.findall(r"^\*\*\d\. .*?`([\w/]+\.(?:py|yaml))`", section, re.MULTILINE)
    assert names == ["my_package/colourful.py", "my_conf/metric/colourful.yaml"]
    for name, content in zip(names, (*blocks(PAGE, "python"), *blocks(PAGE, "yaml")), strict=True):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def spec(place: Path, monkeypatch: pytest.MonkeyPatch) -> MetricSpec:
    monkeypatch.syspath_prepend(str(place))
    return MetricSpec(kind="my_package.colourful", options=dict(OPTIONS))


def test_its_scores_are_those_of_the_definition(spec: MetricSpec):
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, :, 0] = image[1, :, 2] = 200
    grey = np.full((2, 2, 3), 90, np.uint8)
    metric = definition_of("m", spec.kind).load(resolve("m", spec), None)
    # red: rg 200, yb 100; blue: rg 0, yb -200; deviations 100 and 150, means 100 and -50
    expected = [32500**0.5 + 0.3 * 12500**0.5, 0.0]
    assert metric.judge([image, grey], ["", ""]).tolist() == pytest.approx(expected)


def test_its_options_are_recorded(spec: MetricSpec):
    settings = score_settings({"m": spec})["m"]
    assert settings == {
        "kind": "my_package.colourful", "preprocessing": {"resize": "as it is"},
        "options": OPTIONS,
    }  # fmt: skip


def test_kinds_are_known_by_their_files_alone():
    assert list(built_in_kinds()) == sorted(
        ["aesthetic", "clip", "cycle_reward", "hps", "hps_v3", "image_reward", "mps", "oracle",
         "pickscore"]
    )  # fmt: skip


def test_a_module_that_fails_to_import_is_named(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(place))
    (place / "my_package" / "broken.py").write_text("import no_such_library\n")
    with pytest.raises(ValueError, match=r"my_package\.broken cannot be imported.*no_such_library"):
        resolve("m", MetricSpec(kind="my_package.broken"))
    assert import_module("my_package.colourful")


def python(place: Path, *arguments: str) -> None:
    """Run Python here, with the user's package on its path."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env={"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_scores_and_votes(place: Path):
    (command,) = [line for line in shell_lines(PAGE) if "colourful" in line]
    assert shlex.split(command)[:2] == ["make", "labels"]
    ((module, *overrides),) = started(command)
    assert module == "label"
    overrides = [word.replace("//my_conf", f"//{place}/my_conf") for word in overrides]
    small = [f"pairs.root={place}/pairs", "pairs.options.num_pairs=40", "label.workers=1"]
    python(place, "-m", "label", *overrides, *small, "label.device=cpu", f"runs={place}/runs")
    run = place / "runs" / "miniature"
    labelled = pl.read_parquet(run / "labels" / "colour" / "part-*.parquet")
    files = sorted((place / "pairs").glob("train-*.parquet"))
    images = pl.concat([pl.from_arrow(pq.read_table(file, columns=["jpg_0"])) for file in files])
    scored = labelled["status"] == "ok"
    assert scored.sum() >= 30
    expected = [colourfulness(content) for content in images["jpg_0"].filter(scored)]
    np.testing.assert_allclose(labelled["score_colour_0"].filter(scored), expected, rtol=1e-5)
    votes = labelled.filter(scored).select(
        pl.sum_horizontal("vote_hps", "vote_clip", "vote_colour")
    )
    assert (votes.to_series().abs() == labelled.filter(scored)["margin"]).all()
    manifest = read_manifest(run / "scores" / "colour", "colour")
    assert manifest is not None
    assert manifest.settings["options"] == OPTIONS


def colourfulness(content: bytes) -> float:
    """The paper's formula from the two channels' covariance matrix."""
    pixels = np.asarray(Image.open(BytesIO(content)).convert("RGB"), np.float64).reshape(-1, 3)
    opponent = pixels @ np.array([[1, -1, 0], [0.5, 0.5, -1]]).T
    spread = np.trace(np.cov(opponent.T, bias=True))
    return float(np.sqrt(spread) + 0.3 * np.linalg.norm(opponent.mean(0)))
